"""Text from a trained model: read, write, remember."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from phase2_jax.errors import UserError
from phase2_jax.inference.decoding import STEPS_PER_CALL, Decoder
from phase2_jax.inference.loading import LoadedModel, load_model
from phase2_jax.inference.sampling import GenerationConfig, make_filters
from phase2_jax.inference.saved_state import TextState, load_state, save_state
from phase2_jax.inference.text_pieces import encode_pieces
from phase2_jax.inference.text_streams import LONGEST_WAIT, StopStrings, TextStream

# A reader sees text come evenly; between two looks the device works without the host.
SECONDS_PER_CALL = 0.05
DEFAULTS = GenerationConfig()


@dataclass(frozen=True)
class End:
    """How a text ended: `reason` is "stop" or "max_tokens"; `state` has read all of it, a stop string included."""

    reason: str
    num_tokens: int
    state: TextState


@dataclass(frozen=True)
class Piece:
    """A bit of the text of prompt number `row`; the last one of each prompt has an `end`."""

    row: int
    text: str
    end: End | None = None


@dataclass(frozen=True)
class Generation:
    """A whole continuation, without the prompt and without the stop string."""

    text: str
    end: End


@dataclass
class Timing:
    """Seconds of the last call: compiling, reading prompts, and writing; tokens of all rows up to their ends."""

    compiling: float = 0.0
    reading: float = 0.0
    writing: float = 0.0
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Rate of the writing alone, all rows together."""
        return self.tokens / self.writing if self.writing else 0.0


class Generator:
    """Continues texts with a model; memory and time per token do not depend on how much has been read or written.

    Results depend on the seed and on the prompt's place among the prompts, not on the other prompts.
    """

    def __init__(self, loaded: LoadedModel):
        """Args: loaded: from `load_model`."""
        self.loaded = loaded
        self.timing = Timing()
        self._decoder = Decoder(loaded)

    @classmethod
    def from_workdir(cls, workdir: str | Path, checkpoint: str = "best") -> "Generator":
        """The model of a run, at its "best" or "latest" checkpoint or at a step.

        Raises:
          UserError: as `load_model`.
        """
        return cls(load_model(Path(workdir), checkpoint))

    def read(self, text: str | Iterable[str], state: TextState | None = None) -> TextState:
        """The state after `text` (whole, or in pieces of any size), from an empty memory or from `state`.

        Raises:
          UserError: the text gives no token.
        """
        return self._read(text, state)[0]

    def _read(self, text: str | Iterable[str], state: TextState | None) -> tuple[TextState, np.ndarray]:
        """The state after the text, and which tokens occur in it, `(V,)` bool."""
        memory, logits_V = self._decoder.start() if state is None else (state.memory, state.logits_V)
        context = () if state is None else state.context
        seen_V = np.zeros(self.loaded.model_config.vocab_size, bool)
        for piece in encode_pieces([text] if isinstance(text, str) else text, self.loaded.tokenizer):
            memory, logits_V = self._decoder.read(memory, logits_V, piece.tokens)
            context = (*context, *piece.tokens[-LONGEST_WAIT:].tolist())[-LONGEST_WAIT:]
            seen_V[piece.tokens] = True
        if not seen_V.any() and (state is None or text != ""):
            raise UserError("the prompt is empty: give some text to continue")
        return TextState(memory, logits_V, context), seen_V

    def generate(
        self, prompt: str, config: GenerationConfig = DEFAULTS, *, state: TextState | None = None
    ) -> Generation:
        """Continue one prompt; `stream` says the rest."""
        return self.generate_batch([prompt], config, state=state)[0]

    def generate_batch(
        self, prompts: Sequence[str], config: GenerationConfig = DEFAULTS, *, state: TextState | None = None
    ) -> list[Generation]:
        """Continue several prompts together; `stream` says the rest."""
        texts: list[list[str]] = [[] for _ in prompts]
        ends: dict[int, End] = {}
        for piece in self.stream(prompts, config, state=state):
            texts[piece.row].append(piece.text)
            if piece.end is not None:
                ends[piece.row] = piece.end
        return [Generation("".join(text), ends[row]) for row, text in enumerate(texts)]

    def stream(
        self,
        prompts: Sequence[str | Iterable[str]],
        config: GenerationConfig = DEFAULTS,
        *,
        state: TextState | None = None,
    ) -> Iterator[Piece]:
        """Pieces of the continuations as they are written, some twenty times a second.

        Args:
          prompts: each a string, or strings that follow each other; an empty string continues `state` as it is.
          config: how to write.
          state: what has been read before each prompt; None = nothing.

        Raises:
          UserError: a value of `config` is out of range, or there is nothing to continue.
        """
        config.validate()
        if not prompts:
            raise UserError("there is no prompt: give some text to continue")
        self.timing = Timing()
        started = time.perf_counter()
        self._decoder.compile_reading()
        self.timing.compiling = time.perf_counter() - started
        started = time.perf_counter()
        read = [self._read(prompt, state) for prompt in prompts]
        starts = jax.block_until_ready([start for start, _ in read])
        self.timing.reading = time.perf_counter() - started
        yield from self._write(starts, np.stack([seen_V for _, seen_V in read]), config)

    def _write(self, starts: list[TextState], seen_RxV: np.ndarray, config: GenerationConfig) -> Iterator[Piece]:
        texts = [_RowText(self, row, start, config) for row, start in enumerate(starts)]
        rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[start.memory for start in starts])
        logits, seen = jnp.stack([start.logits_V for start in starts]), jnp.asarray(seen_RxV)
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if config.seed is None else config.seed
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(len(starts)))
        filters = make_filters(config)
        started = time.perf_counter()
        if config.max_tokens:
            jax.block_until_ready(self._decoder.write(rows, logits, seen, keys, 0, 0, filters))
        self.timing.compiling += time.perf_counter() - started

        written, count = 0, 1
        while written < config.max_tokens and any(text.end is None for text in texts):
            started = time.perf_counter()
            count = min(count, config.max_tokens - written)
            before = rows
            rows, logits, seen, tokens = self._decoder.write(rows, logits, seen, keys, written, count, filters)
            tokens_TxR = np.asarray(tokens)[:count]
            written += count
            seconds = time.perf_counter() - started
            self.timing.writing += seconds
            for text in texts:
                if text.end is None:
                    pieces = list(text.push(tokens_TxR[:, text.row], before))
                    self.timing.tokens = sum(other.num_tokens for other in texts)
                    yield from pieces
            count = min(STEPS_PER_CALL, max(1, int(SECONDS_PER_CALL * count / max(seconds, 1e-9))))
        for text in texts:
            if text.end is None:
                yield text.finish(jax.tree.map(lambda leaf, row=text.row: leaf[row], rows), logits[text.row])

    def save_state(self, state: TextState, path: str | Path) -> None:
        """Write a state to a file; raises UserError if that fails."""
        save_state(state, self.loaded, Path(path))

    def load_state(self, path: str | Path) -> TextState:
        """Read a state that this model saved; raises UserError for any other file."""
        return load_state(Path(path), self.loaded)


class _RowText:
    """The text of one row on the host."""

    def __init__(self, generator: Generator, row: int, start: TextState, config: GenerationConfig):
        self.row = row
        self.end: End | None = None
        self._generator = generator
        self._stream = TextStream(generator.loaded.tokenizer, start.context)
        self._stops = StopStrings(config.stop)
        self.num_tokens = 0

    def push(self, tokens: np.ndarray, before) -> Iterator[Piece]:
        """Take the tokens of a call that began at the states `before`; they end at a stop string."""
        pieces = []
        for index, token in enumerate(tokens.tolist()):
            text, stopped = self._stops.push(self._stream.push(token))
            pieces.append(text)
            self.num_tokens += 1
            if stopped:
                yield Piece(self.row, "".join(pieces), self._stop(tokens[: index + 1], before))
                return
        if text := "".join(pieces):
            yield Piece(self.row, text)

    def _stop(self, tokens: np.ndarray, before) -> End:
        """The row had been written past the stop: read again what belongs to it."""
        decoder = self._generator._decoder
        memory = jax.tree.map(lambda leaf: leaf[self.row], before)
        memory, logits_V = decoder.read(memory, decoder.start()[1], tokens)
        self.end = End("stop", self.num_tokens, TextState(memory, logits_V, self._stream.context))
        return self.end

    def finish(self, memory, logits_V: jax.Array) -> Piece:
        """The row has all its tokens."""
        text, stopped = self._stops.push(self._stream.flush())
        text += "" if stopped else self._stops.flush()
        state = TextState(memory, logits_V, self._stream.context)
        self.end = End("stop" if stopped else "max_tokens", self.num_tokens, state)
        return Piece(self.row, text, self.end)

"""Loss of a model on a text of any length, read once, in order, with the memory carried along."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from phase2_jax.errors import UserError
from phase2_jax.inference.loading import LoadedModel
from phase2_jax.inference.scores import Scores
from phase2_jax.inference.text_pieces import EncodedPiece
from phase2_jax.inference.text_source import read_documents
from phase2_jax.inference.windows import Window, WindowReader, pieces_of_documents, pieces_of_stream
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import ModelState, init_state

# Tokens of a window, about: a multiple of the consolidation interval.
WINDOW_TOKENS = 512


@dataclass(frozen=True)
class EvaluationConfig:
    """What is read, and how."""

    data: str = ""
    """Text file or folder; empty = the run's own validation text."""
    format: str = ""
    """As data.format; empty = the run's."""
    document_separator: str = ""
    """As data.document_separator; empty = the run's."""
    batch_size: int = 8
    """Windows handed to the device at a time; the figures do not depend on it."""
    max_tokens: int = 0
    """Stop after so many tokens; 0 = read everything."""
    memory_off: bool = False
    """Read a second time without writing to the memory (eta = 0)."""
    wipe_every: tuple[int, ...] = ()
    """Read again, for each number n, with the memory wiped at every n-th token of a document."""

    def validate(self) -> None:
        """Raise UserError that names the first field out of range."""
        if self.batch_size < 1:
            raise UserError(f"--batch_size={self.batch_size} must be at least 1")
        if self.max_tokens < 0:
            raise UserError(f"--max_tokens={self.max_tokens} must be at least 0 (0 = everything)")
        if self.format not in ("", "auto", "text", "wikitext"):
            raise UserError(f"--format={self.format!r} is unknown: use auto, text or wikitext")
        if self.format == "wikitext" and self.document_separator:
            raise UserError("--document_separator and --format=wikitext exclude each other: keep one")
        if bad := [n for n in self.wipe_every if n < 1]:
            raise UserError(f"--wipe_every={bad[0]} must be at least 1 token")


class _Reading:
    """One way of reading the text: a program, its memory, and what came out so far."""

    def __init__(self, program: Callable[..., Any], state: ModelState, wipe_every: int = 0):
        self.scores = Scores()
        self._program, self._state, self._wipe_every = program, state, wipe_every
        self._pending: tuple[list[Window], Any] | None = None

    @property
    def started(self) -> bool:
        """Something has been read."""
        return self._pending is not None

    def add(self, batch: "_Batch") -> None:
        """Read a batch; what the batch before it gave is fetched meanwhile."""
        inputs_WxN = batch.positions_WxN
        reset_WxN = inputs_WxN % self._wipe_every == 0 if self._wipe_every else inputs_WxN == 0
        self._state, outputs = self._program(self._state, batch.tokens_WxM, reset_WxN, batch.lengths_W)
        self._count()
        self._pending = (batch.windows, outputs)

    def finish(self) -> None:
        """Count what the last batch gave."""
        self._count()
        self._pending = None

    def _count(self) -> None:
        if self._pending is None:
            return
        windows, outputs = self._pending
        loss_WxN, right_WxN, layers = jax.device_get(outputs)
        for index, window in enumerate(windows):
            n = len(window)
            figures = {name: value[index] for name, value in vars(layers).items()}
            loss_N, right_N = loss_WxN[index, :n], right_WxN[index, :n]
            whole = n == loss_WxN.shape[1]
            self.scores.add(loss_N, right_N, window.positions[1:], window.seen[1:], figures, whole=whole)


@dataclass(frozen=True)
class _Batch:
    """Windows of M = N + 1 tokens laid into arrays of a fixed shape; what fills them up comes after the text's end."""

    windows: list[Window]
    tokens_WxM: np.ndarray
    positions_WxN: np.ndarray
    lengths_W: np.ndarray

    @classmethod
    def of(cls, windows: list[Window], size: int, length: int) -> "_Batch":
        tokens_WxM = np.zeros((size, length + 1), np.int32)
        positions_WxN = np.ones((size, length), np.int64)
        lengths_W = np.zeros(size, np.int32)
        for index, window in enumerate(windows):
            tokens_WxM[index, : len(window) + 1] = window.tokens
            positions_WxN[index, : len(window)] = window.positions[:-1]
            lengths_W[index] = len(window)
        return cls(windows, tokens_WxM, positions_WxN, lengths_W)


@partial(jax.jit, static_argnums=(0, 1))
def _read_windows(
    graphdef: nnx.GraphDef,
    aligned: bool,
    params: Any,
    state: ModelState,
    tokens_WxM: jax.Array,
    reset_WxN: jax.Array,
    lengths_W: jax.Array,
) -> tuple[ModelState, Any]:
    """State after W windows of M = N + 1 tokens each, and losses (nats), right answers and figures of each.

    Of every window only the first `lengths` tokens are text: the others change no loss before them, and Γ leaves them
    out.
    """

    def body(state: ModelState, xs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[ModelState, Any]:
        tokens_M, reset_N, length = xs
        model = nnx.merge(graphdef, params)
        logits, state, diagnostics = model(
            tokens_M[None, :-1], state, reset_BxN=reset_N[None], aligned=aligned, trace=True
        )
        loss_N = optax.softmax_cross_entropy_with_integer_labels(logits[0], tokens_M[1:])
        right_N = jnp.argmax(logits[0], axis=-1) == tokens_M[1:]
        assert diagnostics.gamma_LxBxNxP is not None
        layers = replace(diagnostics.layers, **_gamma_figures(diagnostics.gamma_LxBxNxP[:, 0], length))
        return state, (loss_N, right_N, layers)

    return jax.lax.scan(body, state, (tokens_WxM, reset_WxN, lengths_W))


def _gamma_figures(gamma_LxNxP: jax.Array, length: jax.Array) -> dict[str, jax.Array]:
    """Γ of every layer over the first `length` tokens."""
    real_1xNx1 = (jnp.arange(gamma_LxNxP.shape[1]) < length)[None, :, None]
    figure = lambda reduce, **options: reduce(gamma_LxNxP, axis=(1, 2), where=real_1xNx1, **options)  # noqa: E731
    return {
        "gamma_mean": figure(jnp.mean),
        "gamma_std": figure(jnp.std),
        "gamma_min": figure(jnp.min, initial=jnp.inf),
        "gamma_max": figure(jnp.max, initial=-jnp.inf),
    }


def evaluate(
    loaded: LoadedModel,
    config: EvaluationConfig | None = None,
    *,
    window_tokens: int = WINDOW_TOKENS,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Every figure of a text, as plain data.

    The text is one stream: memory carries over from window to window, and every token but the first is scored once. A
    document begins with an empty memory, as in training.

    Args:
      loaded: the model.
      config: what to read; None = the run's validation text.
      window_tokens: tokens of a window, rounded down to whole consolidation intervals; changes nothing but speed and
        memory, and at how many places SNR, resonance and stability are sampled.
      progress: called after each batch with the tokens scored so far and their mean loss.

    Returns:
      `checkpoint`, `tokens`, `documents`, `bytes`, `words`, the figures of `Scores.result` for the memory as it is, and
      under `memory_off` and `wiped` (a list with `every`) those of the other readings.

    Raises:
      UserError: a value out of range, a text that cannot be read, or one of fewer than 2 tokens.
    """
    config = config or EvaluationConfig()
    config.validate()
    interval = loaded.model_config.consolidation.interval
    window = interval * max(1, window_tokens // interval) if interval else window_tokens
    readings = _readings(loaded, config, window)
    plain = readings[0]
    reader = WindowReader(loaded.tokenizer, window, config.max_tokens)
    started = time.perf_counter()
    windows = reader.windows(_pieces(loaded, config))
    size = config.batch_size
    while batch := list(islice(windows, size)):
        if not plain.started and len(batch[0]) < window:
            # It is all there is, and its end the only place to look at the memory: nothing may be filled up.
            size, window = 1, len(batch[0])
        for reading in readings:
            reading.add(_Batch.of(batch, size, window))
        scored = plain.scores.all
        if progress is not None and scored.tokens:
            progress(scored.tokens, scored.loss / scored.tokens)
    for reading in readings:
        reading.finish()
    if not plain.scores.all.tokens:
        raise UserError(f"the text has {reader.counts.tokens} token(s), and 2 are needed to score one: give more text")
    counts, word_level = reader.counts, loaded.tokenizer.name == "words"
    results = [reading.scores.result(counts, word_level) for reading in readings]
    others = results[1:]
    return {
        "workdir": loaded.workdir.name,
        "step": loaded.step,
        "data": config.data or "validation text of the run",
        "tokenizer": loaded.tokenizer.name,
        "documents": counts.documents,
        "bytes": counts.num_bytes,
        "words": counts.num_words,
        **results[0],
        "memory_off": others.pop(0) if config.memory_off else None,
        "wiped": [{"every": n, **result} for n, result in zip(config.wipe_every, others, strict=True)],
        "seconds": time.perf_counter() - started,
    }


def _readings(loaded: LoadedModel, config: EvaluationConfig, window: int) -> list[_Reading]:
    """The memory as it is, switched off if asked for, and wiped; programs are shared where they are the same."""
    model = loaded.model_config
    interval = model.consolidation.interval
    aligned = interval > 0 and window % interval == 0

    def program(variant: ModelConfig) -> Callable[..., Any]:
        return partial(_read_windows, loaded.graphdef(variant), aligned, loaded.params)

    state = init_state(model, 1)
    plain = program(model)
    off = [_Reading(program(replace(model, eta=0.0)), state)] if config.memory_off else []
    return [_Reading(plain, state), *off, *(_Reading(plain, state, every) for every in config.wipe_every)]


def _pieces(loaded: LoadedModel, config: EvaluationConfig) -> Iterator[EncodedPiece]:
    data = loaded.config.data
    if not config.data:
        return pieces_of_stream(loaded.validation_text("--data"), loaded.tokenizer)
    # What was asked for by name has to be there, as in training; asking for articles is asking for no separator.
    insist = bool(config.document_separator) or config.format == "wikitext"
    separator = config.document_separator or ("" if config.format == "wikitext" else data.document_separator)
    format = config.format or data.format
    documents = read_documents(Path(config.data).expanduser(), format, separator, insist=insist)
    return pieces_of_documents(documents, loaded.tokenizer)

"""Compiled programs that read and write text token by token, a bounded number of tokens a call.

Every stream of text (row) has a state of its own, with its own position: what happens to it does not depend on which
other rows are written beside it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phase2_jax.inference.loading import LoadedModel
from phase2_jax.inference.sampling import Filters, choose_token
from phase2_jax.memory.consolidation import consolidate
from phase2_jax.model.language_model import ModelState, init_state

# Most tokens of one call: dispatching a call costs about as much as one token of a small model.
STEPS_PER_CALL = 64
# Tokens of a parallel chunk, about: below it the compilation of a chunk takes longer than the single steps.
PREFILL_TOKENS = 256


class Decoder:
    """The programs of one model. Rows are stacked at a leading axis R of single-row states (B = 1)."""

    def __init__(self, loaded: LoadedModel, prefill_tokens: int = PREFILL_TOKENS):
        """Args: prefill_tokens: tokens of a parallel chunk, rounded down to whole consolidation intervals."""
        self.config = loaded.model_config
        self.params = loaded.params
        interval = self.config.consolidation.interval
        self.chunk = interval * max(1, prefill_tokens // interval) if interval else prefill_tokens
        # For one token the plain law is the shortest program. Writing is the program that has to be fast; the one that
        # reads a few tokens has to be compiled fast.
        one = loaded.graphdef(implementation="naive")
        self._feed: Callable[..., Any] = partial(_feed, one, self.params)
        self._write: Callable[..., Any] = partial(_write, one, loaded.tokenizer.vocab_size, self.params)
        self._chunk: Callable[..., Any] = partial(_read_chunk, loaded.graphdef(), self.params)

    def start(self) -> tuple[ModelState, jax.Array]:
        """State before any text (B = 1) and logits that nothing has been said about."""
        return init_state(self.config, 1), jnp.zeros((self.config.vocab_size,), jnp.float32)

    def compile_reading(self) -> None:
        """Have the program for single tokens ready."""
        jax.block_until_ready(self._feed(*self.start(), np.zeros(STEPS_PER_CALL, np.int32), 0))

    def read(self, state: ModelState, logits_V: jax.Array, tokens: np.ndarray) -> tuple[ModelState, jax.Array]:
        """State and next logits after `tokens`, in parallel chunks where whole chunks fit."""
        interval = self.config.consolidation.interval
        position = int(state.position[0])
        until_aligned = -position % interval if interval else 0
        done = 0
        if len(tokens) - until_aligned >= self.chunk:
            state, logits_V = self._read_steps(state, logits_V, tokens[:until_aligned])
            done = until_aligned
            while len(tokens) - done >= self.chunk:
                state, logits_V = self._chunk(state, tokens[done : done + self.chunk])
                done += self.chunk
        return self._read_steps(state, logits_V, tokens[done:])

    def _read_steps(self, state: ModelState, logits_V: jax.Array, tokens: np.ndarray) -> tuple[ModelState, jax.Array]:
        for start in range(0, len(tokens), STEPS_PER_CALL):
            part = tokens[start : start + STEPS_PER_CALL]
            padded = np.zeros(STEPS_PER_CALL, np.int32)
            padded[: len(part)] = part
            state, logits_V = self._feed(state, logits_V, padded, len(part))
        return state, logits_V

    def write(
        self,
        rows: ModelState,
        logits_RxV: jax.Array,
        seen_RxV: jax.Array,
        keys_R: jax.Array,
        first: int,
        count: int,
        filters: Filters,
    ) -> tuple[ModelState, jax.Array, jax.Array, jax.Array]:
        """Draw and read `count` ≤ STEPS_PER_CALL tokens a row.

        Args:
          rows, logits_RxV: after the text so far.
          seen_RxV: bool, tokens the repetition penalty acts on.
          keys_R: one key a row; token number i uses fold_in(key, i), so that the cutting into calls does not matter.
          first: number of the first token.
          count: 0 compiles and changes nothing.
          filters: of the sampling.

        Returns:
          states, logits, seen tokens after the last token, and the tokens `(STEPS_PER_CALL, R)`.
        """
        return self._write(rows, logits_RxV, seen_RxV, keys_R, first, count, filters)


def _step(
    graphdef: nnx.GraphDef, params: Any, rows: ModelState, tokens_R: jax.Array, *, unroll: bool
) -> tuple[ModelState, jax.Array]:
    """States and logits `(R, V)` after one more token a row."""
    model = nnx.merge(graphdef, params)
    config = model.config
    interval = config.consolidation.interval if config.memory else 0

    def one_row(state: ModelState, token: jax.Array) -> tuple[ModelState, jax.Array]:
        # With an interval above 1, aligned leaves the consolidation to us, who do it for the few rows and tokens where
        # it falls due instead of for all: a branch inside the mapped function would be computed everywhere.
        logits, state, _ = model(token[None, None], state, aligned=interval > 1, unroll=unroll)
        return state, logits[0, 0]

    rows, logits_RxV = jax.vmap(one_row)(rows, tokens_R)
    if interval <= 1:
        return rows, logits_RxV
    due_R = rows.position[:, 0] % interval == 0

    def consolidated(rows: ModelState) -> ModelState:
        new = jax.vmap(jax.vmap(partial(consolidate, config=config.memory_config)))(rows)
        return jax.tree.map(lambda a, b: jnp.where(due_R.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, rows)

    return jax.lax.cond(jnp.any(due_R), consolidated, lambda rows: rows, rows), logits_RxV


@partial(jax.jit, static_argnums=0)
def _feed(
    graphdef: nnx.GraphDef, params: Any, state: ModelState, logits_V: jax.Array, tokens_T: jax.Array, count: jax.Array
) -> tuple[ModelState, jax.Array]:
    def body(i, carry):
        return _step(graphdef, params, carry[0], tokens_T[i][None], unroll=False)

    rows = jax.tree.map(lambda x: x[None], state)
    rows, logits_1xV = jax.lax.fori_loop(0, count, body, (rows, logits_V[None]))
    return jax.tree.map(lambda x: x[0], rows), logits_1xV[0]


@partial(jax.jit, static_argnums=(0, 1))
def _write(
    graphdef: nnx.GraphDef,
    num_known: int,
    params: Any,
    rows: ModelState,
    logits_RxV: jax.Array,
    seen_RxV: jax.Array,
    keys_R: jax.Array,
    first: jax.Array,
    count: jax.Array,
    filters: Filters,
) -> tuple[ModelState, jax.Array, jax.Array, jax.Array]:
    num_rows = logits_RxV.shape[0]
    choose = jax.vmap(partial(choose_token, filters=filters))

    def body(i, carry):
        rows, logits_RxV, seen_RxV, tokens_TxR = carry
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_R, first + i)
        # The embedding may have more rows than the tokenizer has tokens.
        tokens_R = choose(logits_RxV[:, :num_known], seen_RxV[:, :num_known], keys)
        seen_RxV = seen_RxV.at[jnp.arange(num_rows), tokens_R].set(True)
        rows, logits_RxV = _step(graphdef, params, rows, tokens_R, unroll=True)
        return rows, logits_RxV, seen_RxV, tokens_TxR.at[i].set(tokens_R)

    tokens_TxR = jnp.zeros((STEPS_PER_CALL, num_rows), jnp.int32)
    return jax.lax.fori_loop(0, count, body, (rows, logits_RxV, seen_RxV, tokens_TxR))


@partial(jax.jit, static_argnums=0)
def _read_chunk(
    graphdef: nnx.GraphDef, params: Any, state: ModelState, tokens_N: jax.Array
) -> tuple[ModelState, jax.Array]:
    logits, state, _ = nnx.merge(graphdef, params)(tokens_N[None], state, aligned=True)
    return state, logits[0, -1]

"""Causality, streaming, documents and rows: what a causal model with an explicit state promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.model.language_model import LanguageModel, init_state

BATCH, LENGTH, VOCAB = 2, 12, 11

# Two float32 programs of two layers; logits are of size 1. Measured: 1e-6.
CLOSE = 2e-5


def assert_states_agree(a, b) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=CLOSE), a, b)


def changed(tokens: np.ndarray, row: slice, at: int | slice) -> np.ndarray:
    other = tokens.copy()
    other[row, at] = (other[row, at] + 1) % VOCAB
    return other


@pytest.mark.parametrize(
    ("dtype", "at"), [*(("float32", at) for at in (0, 1, 6, 8, 11)), *(("bfloat16", at) for at in (0, 1, 5, 7))]
)
def test_causality_bit_for_bit(compiled, compiled_bfloat16, tokens, dtype, at):
    model = {"float32": compiled, "bfloat16": compiled_bfloat16}[dtype]
    tokens = tokens if dtype == "float32" else tokens[:, :8]
    logits = model(tokens)[0]
    other = model(changed(tokens, slice(None), at))[0]
    np.testing.assert_array_equal(logits[:, :at], other[:, :at])
    assert np.all(np.any(logits[:, at:] != other[:, at:], axis=-1)), "no influence on what follows"


def in_pieces(model, cuts, tokens, reset, state=None):
    logits, at = [], 0
    for length in cuts:
        piece = slice(at, at + length)
        part, state, _ = model(tokens[:, piece], state, reset[:, piece])
        logits.append(part)
        at += length
    return np.concatenate(logits, axis=1), state


LENGTHS = (1, 3, 8)  # one token; part of an interval; an interval, at any offset


@given(
    st.lists(st.sampled_from(LENGTHS), min_size=2, max_size=LENGTH),
    st.integers(0, 2**31),
)
def test_streaming_equals_parallel(compiled, lengths, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    reset = rng.random((BATCH, LENGTH)) < 0.1
    cuts = []
    for length in [*lengths, *(1,) * LENGTH]:
        if sum(cuts) + length <= LENGTH:
            cuts.append(length)
    whole, whole_state, _ = compiled(tokens, reset=reset)
    logits, state = in_pieces(compiled, cuts, tokens, reset)
    np.testing.assert_allclose(logits, whole, atol=CLOSE)
    assert_states_agree(state, whole_state)


def test_a_document_is_alone_in_its_stream(compiled, tokens):
    """The second document equals itself from a fresh state; the stream's position is the one thing that goes on."""
    at = 4
    reset = np.zeros((BATCH, LENGTH), bool)
    reset[:, at] = True
    logits, state, _ = compiled(tokens, reset=reset)
    fresh = replace(init_state(compiled.config, BATCH), position=jnp.full((2,), at, jnp.int32))
    alone, alone_state, _ = compiled(tokens[:, at:], fresh)
    np.testing.assert_allclose(logits[:, at:], alone, atol=CLOSE)
    assert_states_agree(replace(state, lyapunov=None), replace(alone_state, lyapunov=None))
    # Without the reset it would see what came before.
    assert np.max(np.abs(compiled(tokens)[0][:, at:] - alone)) > 1e-2


def test_a_reset_concerns_its_row_alone(compiled, tokens):
    reset = np.zeros((BATCH, LENGTH), bool)
    plain = compiled(tokens, reset=reset)[0]
    reset[0, 5] = True
    logits = compiled(tokens, reset=reset)[0]
    np.testing.assert_array_equal(logits[1], plain[1])
    np.testing.assert_array_equal(logits[0, :5], plain[0, :5])
    assert np.any(logits[0, 5:] != plain[0, 5:])


def test_rows_do_not_meet(compiled, tokens):
    logits, state, _ = compiled(tokens)
    other, other_state, _ = compiled(changed(tokens, slice(1, 2), slice(None)))
    np.testing.assert_array_equal(logits[0], other[0])
    assert np.any(logits[1] != other[1])

    def same_first_row(a, b):
        if a.ndim > 1:  # all but the position
            np.testing.assert_array_equal(a[:, 0], b[:, 0])

    jax.tree.map(same_first_row, state, other_state)


def test_a_state_is_not_changed_by_its_use(compiled, tokens):
    state = compiled(tokens)[1]
    before = jax.tree.map(np.array, state)
    compiled(tokens, state)
    jax.tree.map(np.testing.assert_array_equal, before, state)


def test_a_false_promise_of_alignment_is_refused(config, tokens):
    model = LanguageModel(config, seq_len=LENGTH, rngs=nnx.Rngs(0))
    state = replace(init_state(config, BATCH), position=jnp.full((2,), 12, jnp.int32))
    with pytest.raises(ValueError, match="position 12, no multiple of 8"):
        model(jnp.asarray(tokens), state, aligned=True)

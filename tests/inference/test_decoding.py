"""Reading and writing token by token is the same function as the parallel forward pass."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.inference import decoding
from phase2_jax.inference.decoding import Decoder
from phase2_jax.inference.sampling import GenerationConfig, make_filters
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.language_model import LanguageModel

# Logits are of order 1 and float32; the two programs sum in another order, and errors of 1e-6 grow a little through the
# layers and the memory.
CLOSE: dict[str, Any] = {"atol": 5e-5, "rtol": 5e-5}
GREEDY = make_filters(GenerationConfig(temperature=0))
SAMPLED = make_filters(GenerationConfig(temperature=1))


@pytest.fixture(scope="module")
def decoder(loaded) -> Decoder:
    return Decoder(loaded, prefill_tokens=16)


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, 45).astype(np.int32)


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def write(decoder: Decoder, state, logits_V, count: int, filters=GREEDY, first: int = 0, seed: int = 0):
    """Write from one row; state, logits and tokens."""
    rows = stack(state)
    seen = jnp.zeros((1, len(logits_V)), bool)
    keys = jax.random.split(jax.random.key(seed), 1)
    rows, logits, _, written = decoder.write(rows, logits_V[None], seen, keys, first, count, filters)
    return jax.tree.map(lambda leaf: leaf[0], rows), logits[0], np.asarray(written)[:count, 0]


def assert_same_state(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **CLOSE)


def test_reading_equals_the_parallel_forward_pass(decoder: Decoder, loaded, tokens, forward):
    logits_NxV, state = forward(loaded, tokens)
    # 7: only single steps; 16: only a chunk; 45: chunks and steps.
    for length in (1, 7, 8, 16, 45):
        mine, logits_V = decoder.read(*decoder.start(), tokens[:length])
        np.testing.assert_allclose(logits_V, logits_NxV[length - 1], **CLOSE)
    assert_same_state(mine, state)


def test_reading_on_from_any_place(decoder: Decoder, tokens):
    whole, logits_V = decoder.read(*decoder.start(), tokens)
    for cut in (3, 13, 20):
        part = decoder.read(*decoder.start(), tokens[:cut])
        state, same_V = decoder.read(*part, tokens[cut:])
        np.testing.assert_allclose(same_V, logits_V, **CLOSE)
        assert_same_state(state, whole)


def test_writing_equals_the_parallel_forward_pass(decoder: Decoder, loaded, tokens, forward):
    prompt = tokens[:11]
    state, logits_V, written = write(decoder, *decoder.read(*decoder.start(), prompt), 34)
    logits_NxV, same = forward(loaded, np.concatenate([prompt, written]))
    np.testing.assert_array_equal(np.argmax(logits_NxV[10:-1], axis=-1), written)
    np.testing.assert_allclose(logits_V, logits_NxV[-1], **CLOSE)
    assert_same_state(state, same)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {
            "consolidation": ConsolidationConfig(1),
            "position_embedding": "zeta",
            "tie_embeddings": True,
            "conv_width": 1,
        },
        {"consolidation": ConsolidationConfig(0), "shared_potential": True},
        {"memory": False},
    ],
    ids=["every token", "no consolidation", "no memory"],
)
def test_every_architecture_reads_alike(loaded, tokens, forward, change):
    config = replace(loaded.model_config, **change)
    params = nnx.split(nnx.jit(lambda: LanguageModel(config, seq_len=32, rngs=nnx.Rngs(1)))())[1]
    changed = replace(loaded, model_config=config, params=params)
    decoder = Decoder(changed, prefill_tokens=16)
    state, logits_V = decoder.read(*decoder.start(), tokens)
    logits_NxV, same = forward(changed, tokens)
    np.testing.assert_allclose(logits_V, logits_NxV[-1], **CLOSE)
    # Without consolidation every call closes an interval of the monitor, which therefore depends on the cutting.
    empty = state.lyapunov
    assert_same_state(replace(state, lyapunov=empty), replace(same, lyapunov=empty))


@pytest.mark.slow
def test_rows_do_not_notice_each_other(decoder: Decoder, tokens):
    """Rows of different lengths consolidate at different tokens."""
    starts = [decoder.read(*decoder.start(), tokens[:length]) for length in (5, 11, 16)]
    keys = jax.random.split(jax.random.key(3), 3)
    rows, logits = stack(*[state for state, _ in starts]), jnp.stack([logits_V for _, logits_V in starts])
    seen = jnp.zeros(logits.shape, bool)
    together, logits_RxV, _, written_TxR = decoder.write(rows, logits, seen, keys, 0, 20, SAMPLED)
    for row, (state, logits_V) in enumerate(starts):
        alone, alone_RxV, _, alone_Tx1 = decoder.write(
            stack(state), logits_V[None], seen[:1], keys[row : row + 1], 0, 20, SAMPLED
        )
        np.testing.assert_array_equal(np.asarray(written_TxR)[:20, row], np.asarray(alone_Tx1)[:20, 0])
        np.testing.assert_allclose(logits_RxV[row], alone_RxV[0], **CLOSE)
        mine = jax.tree.map(lambda leaf, row=row: leaf[row], together)
        assert_same_state(mine, jax.tree.map(lambda leaf: leaf[0], alone))


def test_the_cutting_into_calls_changes_nothing(decoder: Decoder, tokens):
    start = decoder.read(*decoder.start(), tokens[:9])
    state, logits_V, at_once = write(decoder, *start, 12, SAMPLED)
    part, part_V, first = write(decoder, *start, 5, SAMPLED)
    same, same_V, rest = write(decoder, part, part_V, 7, SAMPLED, first=5)
    np.testing.assert_array_equal(at_once, np.concatenate([first, rest]))
    np.testing.assert_array_equal(logits_V, same_V)
    jax.tree.map(np.testing.assert_array_equal, state, same)


def test_nothing_is_compiled_again_as_the_text_grows(decoder: Decoder, tokens):
    programs: tuple[Any, ...] = (decoding._write, decoding._feed, decoding._read_chunk)
    sizes = lambda: [program._cache_size() for program in programs]  # noqa: E731
    state, logits_V = decoder.read(*decoder.start(), tokens)
    write(decoder, state, logits_V, 1, SAMPLED)
    before = sizes()
    for count in (2, 64, 3):
        state, logits_V, _ = write(decoder, state, logits_V, count, SAMPLED)
        state, logits_V = decoder.read(state, logits_V, tokens)
    assert sizes() == before

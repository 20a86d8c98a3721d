"""The baselines' layers: causal, and the recurrence as published, each document by itself."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from phase2_jax.errors import UserError
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "baselines" / "blocks.py"
CONFIG = ModelConfig(
    vocab_size=11, d_model=16, num_layers=2, num_heads=2, head_dim=4, value_dim=8, ffn_dim=24, resolvent=False
)


@pytest.fixture(scope="module")
def blocks():
    spec = importlib.util.spec_from_file_location("blocks", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["transformer", "gla"])
def model(blocks, request):
    def make(config, seq_len, implementation, rngs):
        return blocks.BaselineBlock(request.param, config, rngs)

    made = LanguageModel(CONFIG, seq_len=12, rngs=nnx.Rngs(params=0), block=make)
    graphdef, params = nnx.split(made)
    return request.param, jax.jit(
        lambda tokens, state, reset: nnx.merge(graphdef, params)(tokens, state, reset_BxN=reset)
    )


TOKENS = np.random.default_rng(0).integers(0, 11, (2, 12))
NO_RESET = np.zeros((2, 12), bool)


def test_no_token_sees_a_later_one(model):
    _, call = model
    logits, _, _ = call(TOKENS, init_state(CONFIG, 2), NO_RESET)
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 11
    other, _, _ = call(changed, init_state(CONFIG, 2), NO_RESET)
    np.testing.assert_array_equal(logits[:, :7], other[:, :7])
    assert np.abs(logits[:, 7:] - other[:, 7:]).min(axis=-1).max() > 0


def test_a_document_of_the_recurrence_knows_nothing_of_the_one_before(model):
    name, call = model
    if name == "transformer":
        pytest.skip("attention reaches over a document's end inside its window")
    reset = NO_RESET.copy()
    reset[:, 5] = True
    logits, _, _ = call(TOKENS, init_state(CONFIG, 2), reset)
    changed = TOKENS.copy()
    changed[:, :5] = (changed[:, :5] + 1) % 11
    other, _, _ = call(changed, init_state(CONFIG, 2), reset)
    # Sums of gates since the chunk began are rounded together.
    np.testing.assert_allclose(logits[:, 5:], other[:, 5:], atol=1e-6)


def test_gated_linear_attention_carries_its_state(model):
    name, call = model
    state = init_state(CONFIG, 2)
    whole, _, _ = call(TOKENS, state, NO_RESET)
    first, state, _ = call(TOKENS[:, :6], state, NO_RESET[:, :6])
    second, _, _ = call(TOKENS[:, 6:], state, NO_RESET[:, 6:])
    np.testing.assert_allclose(first, whole[:, :6], atol=1e-5)
    difference = np.abs(second - whole[:, 6:]).max()
    # Float32 programs of the same function; attention forgets everything before its window.
    assert difference < 1e-5 if name == "gla" else difference > 1e-2


@pytest.mark.parametrize("num_tokens", [1, 16, 45])
def test_the_chunked_recurrence_is_that_of_single_tokens(blocks, num_tokens):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, num_tokens, 3, width)).astype(np.float32) for width in (4, 4, 5))
    log_gate = -np.abs(rng.standard_normal(q.shape)).astype(np.float32) * rng.choice([0.01, 3], q.shape[:3])[..., None]
    reset, start = rng.random((2, num_tokens)) < 0.1, rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    y, last = jax.jit(blocks.gated_scan)(q, k, v, log_gate, start, reset)
    state = start.astype(np.float64)
    for t in range(num_tokens):
        gate = np.where(reset[:, t, None, None], 0, np.exp(np.maximum(log_gate[:, t], blocks.LOG_GATE_FLOOR)))
        state = gate[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        # Float32 sums of some ten products.
        np.testing.assert_allclose(y[:, t], np.einsum("bhk,bhkv->bhv", q[:, t], state), atol=2e-5)
    np.testing.assert_allclose(last, state, atol=2e-5)


def test_dropped_tokens_leave_gradients_small(blocks):
    """Attention at a row's first token, if that was dropped, would have layers of nothing but zeros."""
    config = replace(CONFIG, num_layers=4, token_dropout=0.5)
    layers = lambda config, seq_len, implementation, rngs: blocks.BaselineBlock("transformer", config, rngs)  # noqa: E731
    graphdef, params = nnx.split(LanguageModel(config, seq_len=12, rngs=nnx.Rngs(params=0), block=layers))
    tokens = jax.random.randint(jax.random.key(3), (16, 12), 0, 11)

    @jax.jit
    @jax.grad
    def gradients(params):
        rngs, state = nnx.Rngs(dropout=1), init_state(config, 16)
        logits, _, _ = nnx.merge(graphdef, params)(tokens, state, deterministic=False, rngs=rngs)
        return (logits**2).mean()

    # About 1; 1e10 where zeros pass ten norms.
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(gradients(params))) < 1e3


def test_a_resolvent_is_refused(blocks):
    with pytest.raises(UserError, match=r"--config\.model\.resolvent=False"):
        blocks.BaselineBlock("gla", replace(CONFIG, resolvent=True), nnx.Rngs(0))


def test_rotation_depends_on_distances_alone(blocks):
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((1, 1, 1, 8)).astype(np.float32).repeat(20, axis=1) for _ in range(2))
    scores = np.einsum("bnhk,bmhk->nm", *(np.asarray(jax.jit(partial(blocks.rotate))(x)) for x in (q, k)))
    for distance in (0, 3, 11):
        diagonal = np.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.abs(scores[3, 0] - scores[0, 0]) > 1e-2

"""The baselines' layers: causal, each document by itself, and the recurrence as published."""

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


def test_a_document_knows_nothing_of_the_one_before(model):
    _, call = model
    reset = NO_RESET.copy()
    reset[:, 5] = True
    logits, _, _ = call(TOKENS, init_state(CONFIG, 2), reset)
    changed = TOKENS.copy()
    changed[:, :5] = (changed[:, :5] + 1) % 11
    other, _, _ = call(changed, init_state(CONFIG, 2), reset)
    np.testing.assert_array_equal(logits[:, 5:], other[:, 5:])


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

"""Gradients of the whole model against finite differences, in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state


@pytest.fixture
def float64(monkeypatch):
    """The model computes in float32 by name; here that name means float64, so that differences resolve its gradient."""
    monkeypatch.setattr(ModelConfig, "validate", lambda self: None)  # which refuses dtype="float64"
    with jax.enable_x64(True):
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_every_parameter_against_finite_differences(config, loss_of):
    """Through two layers, feedback, a document's start and two consolidations, from a memory that has lived."""
    config = replace(config, dtype="float64", consolidation=ConsolidationConfig(4))
    graphdef, params = nnx.split(LanguageModel(config, seq_len=8, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, 8)))
    reset = jnp.zeros((2, 8), bool).at[0, 5].set(True)
    start = init_state(config, 2, jnp.float64)
    lived = replace(start, w_BxHxKxV=jnp.asarray(rng.standard_normal(start.w_BxHxKxV.shape)) / 4)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        logits, state, _ = nnx.merge(graphdef, params)(tokens, lived, reset_BxN=reset, aligned=True)
        assert logits.dtype == state.w_BxHxKxV.dtype == jnp.float64
        return loss_of(logits, tokens) + jnp.mean(jnp.sin(state.w_BxHxKxV))

    gradient = loss_and_gradient(params)[1]
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    for index, ((path, leaf), slope_leaf) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = rng.standard_normal(leaf.shape)

        def loss_at(step: float, index=index, direction=direction) -> float:
            moved = [x + step * direction if i == index else x for i, (_, x) in enumerate(leaves)]
            return float(loss_and_gradient(jax.tree.unflatten(structure, moved))[0])

        slope = float(np.sum(slope_leaf * direction))
        # Steps of 1e-5: 1e-10 times a third derivative, and 1e-16 / 1e-5 of rounding.
        expected = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-9), jax.tree_util.keystr(path)
        assert abs(slope) > 1e-6, f"{jax.tree_util.keystr(path)} has no influence: a useless example"

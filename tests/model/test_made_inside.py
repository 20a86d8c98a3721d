"""What a program makes itself, constants to its compiler, has to give what the same numbers give as its arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state


def build(**changes) -> tuple[ModelConfig, LanguageModel]:
    config = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=2, head_dim=32, ffn_dim=32, **changes)
    return config, LanguageModel(config, seq_len=64, rngs=nnx.Rngs(0))


def spoil_free_memory() -> None:
    """NaN wherever an array may be put that nobody writes."""
    for size in (10**3, 10**4, 10**5):
        spoiled = [np.full(size, np.nan, np.float32) for _ in range(50)]
        del spoiled


def with_gradient(graphdef, params, tokens, state):
    def loss(params):
        model = nnx.merge(graphdef, params)
        logits, after, diagnostics = model(tokens, state, aligned=True)
        return jnp.mean(jnp.square(logits)), (logits, after, diagnostics)

    return jax.value_and_grad(loss, has_aux=True)(params)


def assert_same(found, expected):
    # Another program may sum in another order; what was never written is of any size.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), found, expected)


@pytest.mark.parametrize(("memory_feedback", "interval"), [(True, 0), (False, 0), (False, 32)])
def test_a_memory_that_starts_empty_inside_the_program(memory_feedback, interval):
    config, model = build(consolidation=ConsolidationConfig(interval), memory_feedback=memory_feedback)
    graphdef, params = nnx.split(model)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 64)))
    inside = jax.jit(lambda p, t: with_gradient(graphdef, p, t, init_state(config, 2)))
    outside = jax.jit(lambda p, t, s: with_gradient(graphdef, p, t, s))
    spoil_free_memory()
    assert_same(inside(params, tokens), outside(params, tokens, init_state(config, 2)))


def test_no_feedback_is_a_feedback_of_nothing():
    config, model = build(memory_feedback=False)
    _, feeding = build()
    assert feeding.feedback is not None
    feeding.feedback[...] *= 0
    state = init_state(config, 2)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 64)))
    for name in ("blocks", "embedding", "norm", "head"):
        setattr(feeding, name, getattr(model, name))
    graphdef, params = nnx.split(model)
    other_graphdef, other_params = nnx.split(feeding)
    spoil_free_memory()
    found = jax.jit(lambda p: nnx.merge(graphdef, p)(tokens, state))(params)
    assert_same(found, jax.jit(lambda p: nnx.merge(other_graphdef, p)(tokens, state))(other_params))

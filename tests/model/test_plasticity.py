"""A model whose memory corrects errors keeps the promises of one that does not, and learns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phase2_jax.model.language_model import init_state

VOCAB = 11


@pytest.fixture(scope="module")
def compiled_delta(config, make_compiled):
    return make_compiled(replace(config, plasticity="delta"))


def test_causality_bit_for_bit(compiled_delta, tokens):
    logits = compiled_delta(tokens)[0]
    for at in (1, 8, 11):
        other = tokens.copy()
        other[:, at] = (other[:, at] + 1) % VOCAB
        changed = compiled_delta(other)[0]
        np.testing.assert_array_equal(logits[:, :at], changed[:, :at])
        assert np.all(np.any(logits[:, at:] != changed[:, at:], axis=-1)), "no influence on what follows"


def test_streaming_equals_parallel(compiled_delta, tokens):
    """Through a consolidation and a document's start, with single tokens as in decoding."""
    reset = np.zeros(tokens.shape, bool)
    reset[0, 5] = True
    whole, whole_state, _ = compiled_delta(tokens, reset=reset)
    parts, state, at = [], None, 0
    for length in (1, 3, 3, 1, 1, 3):
        part, state, _ = compiled_delta(tokens[:, at : at + length], state, reset[:, at : at + length])
        parts.append(part)
        at += length
    # Two float32 programs of two layers; logits are of size 1.
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), state, whole_state)


def test_the_memory_stays_within_its_bound(compiled_delta, tokens):
    _, _, diagnostics = compiled_delta(tokens)
    assert np.all((diagnostics.layers.coherence > 0) & (diagnostics.layers.coherence <= 1 + 1e-6))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_few_steps_lower_the_loss(config, make_compiled, loss_of, tokens, dtype):
    model = make_compiled(replace(config, plasticity="delta", dtype=dtype, num_layers=1))
    optimizer = optax.adam(3e-2)

    def loss(params):
        logits, _, _ = model._forward(params, tokens, init_state(model.config, len(tokens)), tokens < 0, True)
        return loss_of(logits.astype(jnp.float32), tokens)

    def step(carry, _):
        params, opt_state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    start = (model.params, optimizer.init(model.params))
    losses = np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=10))(start)[1])
    # Twelve tokens of two rows are soon known by heart.
    assert losses[-1] < 0.7 * losses[0]

"""The loss in blocks of tokens against the loss of all logits, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from phase2_jax.data.batch import NOT_SCORED
from phase2_jax.training.loss import head_loss, token_loss

B, N, D, V = 2, 7, 5, 11


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, N, D)), dtype)
    head = jnp.asarray(rng.standard_normal((D, V)), jnp.float32)
    labels = rng.integers(0, V, (B, N))
    labels[0, 2] = labels[1, -1] = NOT_SCORED
    return hidden, head, jnp.asarray(labels)


def plain(hidden, head, labels):
    logits = jnp.einsum("bnd,dv->bnv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return token_loss(logits, labels)[0]


# Blocks of 1, 2 (the last one cut short), 3 and all 7 tokens of a row.
@pytest.mark.parametrize("entries", [1, 2 * B * V, 3 * B * V, 0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_blocks_change_nothing(entries, dtype, tolerance):
    # In bfloat16 the cotangents of the logits are rounded to 8 bits before the products.
    hidden, head, labels = inputs(dtype)
    value, (dhidden, dhead) = jax.value_and_grad(partial(head_loss, entries=entries), (0, 1))(hidden, head, labels)
    expected, (dhidden_expected, dhead_expected) = jax.value_and_grad(plain, (0, 1))(hidden, head, labels)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert (dhidden.dtype, dhead.dtype) == (dtype, jnp.float32)
    for found, wanted in ((dhidden, dhidden_expected), (dhead, dhead_expected)):
        wanted = np.asarray(wanted, np.float32)
        np.testing.assert_allclose(
            np.asarray(found, np.float32), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
        )


def test_against_differences_and_scaled():
    hidden, head, labels = inputs()
    check_grads(lambda h, w: 0.3 * head_loss(h, w, labels, entries=2 * B * V), (hidden, head), order=1, modes=["rev"])


def test_without_gradient_and_without_labels():
    hidden, head, labels = inputs()
    np.testing.assert_allclose(head_loss(hidden, head, labels, entries=1), plain(hidden, head, labels), rtol=2e-6)
    assert float(head_loss(hidden, head, jnp.full_like(labels, NOT_SCORED))) == 0


def test_logits_never_exist_whole():
    hidden, head, labels = inputs()
    step = jax.jit(jax.grad(partial(head_loss, entries=B * V), (0, 1)))
    shapes = set(str(step.lower(hidden, head, labels).as_text()).split("tensor<"))
    assert any(shape.startswith(f"{B}x1x{V}xf32") for shape in shapes)
    assert not any(shape.startswith(f"{B}x{N}x{V}xf32") for shape in shapes)

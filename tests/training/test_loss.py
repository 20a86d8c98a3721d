"""The loss in blocks of tokens against the loss of all logits, values and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from phase2_jax.data.batch import NOT_SCORED
from phase2_jax.training import loss
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


def scored_only(labels, counts):
    """Labels at so many random places of each row."""
    ranks = np.random.default_rng(1).permuted(np.tile(np.arange(N), (B, 1)), axis=1)
    return jnp.where(ranks < np.array(counts)[:, None], jnp.maximum(labels, 0), NOT_SCORED)


def assert_is_plain(hidden, head, labels, entries, tolerance):
    """Value and both gradients are those of all logits at a time."""
    blocked = jax.jit(jax.value_and_grad(partial(head_loss, entries=entries), (0, 1)))
    value, (dhidden, dhead) = blocked(hidden, head, labels)
    expected, (dhidden_expected, dhead_expected) = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, head, labels)
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert (dhidden.dtype, dhead.dtype) == (hidden.dtype, jnp.float32)
    for found, wanted in ((dhidden, dhidden_expected), (dhead, dhead_expected)):
        wanted = np.asarray(wanted, np.float32)
        np.testing.assert_allclose(
            np.asarray(found, np.float32), wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max()
        )


# Blocks of 1, 2 (the last one cut short), 3 and all 7 tokens of a row.
blocks = pytest.mark.parametrize("entries", [1, 2 * B * V, 3 * B * V, 0])


@blocks
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_blocks_change_nothing(entries, dtype, tolerance):
    # In bfloat16 the cotangents of the logits are rounded to 8 bits before the products.
    assert_is_plain(*inputs(dtype), entries, tolerance)


@blocks
@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (0, 3), (4, 2), (6, 1), (7, 7)], ids=str)
def test_few_scored_tokens_change_nothing(entries, counts):
    hidden, head, labels = inputs()
    labels = scored_only(labels, counts)
    # As above: float32 sums in another order.
    assert_is_plain(hidden, head, labels, entries, 2e-6)
    without_gradient = jax.jit(partial(head_loss, entries=entries))(hidden, head, labels)
    np.testing.assert_allclose(without_gradient, plain(hidden, head, labels), rtol=2e-6)


# Blocks of 2: rows with 3 and 1 scored tokens need two of the four, the second half empty for one of them.
@pytest.mark.parametrize(("counts", "needed"), [((0, 0), 0), ((3, 1), 2), ((7, 7), 4)], ids=str)
def test_blocks_are_the_scored_tokens_in_their_order(monkeypatch, counts, needed):
    hidden, head, labels = inputs()
    labels = scored_only(labels, counts)
    seen, logits = [], loss._logits

    def watched(block, head_DxV):
        jax.debug.callback(lambda array: seen.append(np.array(array)), block, ordered=True)
        return logits(block, head_DxV)

    monkeypatch.setattr(loss, "_logits", watched)
    jax.jit(jax.grad(partial(head_loss, entries=2 * B * V)))(hidden, head, labels)
    jax.effects_barrier()
    wanted = np.zeros((B, 2 * needed, D), np.float32)
    for row, scored in enumerate(np.asarray(labels) != NOT_SCORED):
        wanted[row, : scored.sum()] = hidden[row, scored]
    assert len(seen) == needed
    np.testing.assert_array_equal(np.concatenate(seen, axis=1) if seen else wanted, wanted)


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

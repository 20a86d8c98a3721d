"""Cross-entropy of the next token, from logits or from what the head reads."""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from phase2_jax.data.batch import NOT_SCORED

# Logits that exist at a time: more than these fall out of a CPU's caches, or weigh on the memory of a GPU.
_ENTRIES_CPU = 2**22
_ENTRIES_ELSEWHERE = 2**26

Carry = TypeVar("Carry")


def token_loss(logits_BxNxV: jax.Array, labels_BxN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats over the labels that count, and how many there are."""
    scored_BxN = labels_BxN != NOT_SCORED
    label_logit_BxN = jnp.sum(jnp.where(_is_label(logits_BxNxV, labels_BxN), logits_BxNxV, 0), axis=-1)
    loss_BxN = jax.nn.logsumexp(logits_BxNxV, axis=-1) - label_logit_BxN
    return jnp.sum(jnp.where(scored_BxN, loss_BxN, 0)), jnp.sum(scored_BxN)


def num_right(logits_BxNxV: jax.Array, labels_BxN: jax.Array) -> jax.Array:
    """How many of the labels that count are the likeliest token."""
    return jnp.sum(jnp.argmax(logits_BxNxV, axis=-1) == labels_BxN)


def head_loss(hidden_BxNxD: jax.Array, head_DxV: jax.Array, labels_BxN: jax.Array, entries: int = 0) -> jax.Array:
    """`token_loss(hidden @ head, labels)[0]`, float32, without ever holding all logits.

    A large vocabulary makes the logits the largest arrays of a step by far, and its loss passes over them several
    times. Here they come in blocks of tokens; each block's gradient is computed while its logits are there, so the
    backward pass has nothing left to do but to scale (Hsu et al., "Liger Kernel", 2024).

    Blocks are made of scored tokens only, and as many are computed as the row with most of them needs. Where every
    token is scored, the blocks are the tokens in their order and nothing changes, bit for bit.

    Args:
      hidden_BxNxD: in the dtype of the products.
      head_DxV: float32, rounded to that dtype for the products.
      labels_BxN: next tokens, `NOT_SCORED` where there is none.
      entries: logits that may exist at a time; 0 chooses by device.
    """
    batch, num_tokens, _ = hidden_BxNxD.shape
    entries = entries or (_ENTRIES_CPU if jax.default_backend() == "cpu" else _ENTRIES_ELSEWHERE)
    blocks = math.ceil(num_tokens / max(1, entries // (batch * head_DxV.shape[1])))
    return _blocked_loss(hidden_BxNxD, head_DxV, labels_BxN, math.ceil(num_tokens / blocks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _blocked_loss(hidden_BxNxD: jax.Array, head_DxV: jax.Array, labels_BxN: jax.Array, length: int) -> jax.Array:
    def body(block: jax.Array | int, total: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        del block
        return total + token_loss(_logits(hidden, head_DxV), labels)[0]

    return _over_scored(body, jnp.zeros(()), hidden_BxNxD, labels_BxN, length)


def _forward(hidden_BxNxD: jax.Array, head_DxV: jax.Array, labels_BxN: jax.Array, length: int):
    dtype = hidden_BxNxD.dtype

    def body(
        block: jax.Array | int, carry: tuple[jax.Array, jax.Array, jax.Array], hidden: jax.Array, labels: jax.Array
    ):
        total, dhead_DxV, dscored_BxMxD = carry
        logits = _logits(hidden, head_DxV)
        normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        is_label, scored = _is_label(logits, labels), (labels != NOT_SCORED)[..., None]
        label_logit = jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)
        total = total + jnp.sum(jnp.where(scored, normaliser - label_logit, 0))
        # Stored once, or a CPU evaluates the exponentials again in each of the two products.
        dlogits = jax.lax.optimization_barrier(
            jnp.where(scored, jnp.exp(logits - normaliser) - is_label, 0).astype(dtype)
        )
        dhidden = jnp.einsum("bnv,dv->bnd", dlogits, head_DxV.astype(dtype), preferred_element_type=jnp.float32)
        dhead_DxV = dhead_DxV + jnp.einsum("bnd,bnv->dv", hidden, dlogits, preferred_element_type=jnp.float32)
        dscored_BxMxD = jax.lax.dynamic_update_slice_in_dim(dscored_BxMxD, dhidden.astype(dtype), block * length, 1)
        return total, dhead_DxV, dscored_BxMxD

    batch, num_tokens, width = hidden_BxNxD.shape
    room = length * math.ceil(num_tokens / length)
    start = jnp.zeros(()), jnp.zeros_like(head_DxV), jnp.zeros((batch, room, width), dtype)
    total, dhead_DxV, dscored_BxMxD = _over_scored(body, start, hidden_BxNxD, labels_BxN, length)
    if length == num_tokens:
        return total, (dscored_BxMxD, dhead_DxV, labels_BxN)
    # Where each token stands among the scored: its gradient comes back by a gather, no scatter.
    scored_BxN = labels_BxN != NOT_SCORED
    ranks_BxN = jnp.where(scored_BxN, jnp.cumsum(scored_BxN, axis=1) - 1, room)
    return total, (_take(dscored_BxMxD, ranks_BxN, 0), dhead_DxV, labels_BxN)


def _backward(length: int, residuals: tuple[jax.Array, jax.Array, jax.Array], dtotal: jax.Array):
    del length
    dhidden_BxNxD, dhead_DxV, labels_BxN = residuals
    no_gradient = np.zeros(labels_BxN.shape, jax.dtypes.float0)
    return (dtotal * dhidden_BxNxD).astype(dhidden_BxNxD.dtype), dtotal * dhead_DxV, no_gradient


_blocked_loss.defvjp(_forward, _backward)


def _logits(hidden: jax.Array, head_DxV: jax.Array) -> jax.Array:
    return jnp.einsum("bnd,dv->bnv", hidden, head_DxV.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _is_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    # A comparison instead of a gather: the gather's gradient would be an array of zeros as large as the logits.
    return jnp.arange(logits.shape[-1]) == labels[..., None]


def _over_scored(
    body: Callable[..., Carry], carry: Carry, hidden_BxNxD: jax.Array, labels_BxN: jax.Array, length: int
) -> Carry:
    """`carry = body(block, carry, hidden, labels)` for blocks 0, 1, ... of `length` scored tokens of every row in their
    order. Rows that have no more get hidden 0 and no label; the number of blocks is that of the row with most.

    Every row is sorted on its own: rows that lie on different devices exchange nothing but that number. A block that
    holds whole rows takes them as they are, for there is nothing to save.
    """
    num_tokens = labels_BxN.shape[1]
    if length == num_tokens:
        return body(0, carry, hidden_BxNxD, labels_BxN)
    scored_BxN = labels_BxN != NOT_SCORED
    places_BxN = jnp.sort(jnp.where(scored_BxN, jnp.arange(num_tokens), num_tokens), axis=1)
    places_BxM = jnp.pad(places_BxN, ((0, 0), (0, -num_tokens % length)), constant_values=num_tokens)

    def one(block: jax.Array, carry: Carry) -> Carry:
        places = jax.lax.dynamic_slice_in_dim(places_BxM, block * length, length, axis=1)
        return body(block, carry, _take(hidden_BxNxD, places, 0), _take(labels_BxN, places, NOT_SCORED))

    blocks = (jnp.max(jnp.sum(scored_BxN, axis=1)) + length - 1) // length
    return jax.lax.fori_loop(0, blocks, one, carry)


def _take(rows: jax.Array, places: jax.Array, fill: int) -> jax.Array:
    """Of every row the entries at its `places`, `fill` where a place lies beyond the row."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=fill))(rows, places)

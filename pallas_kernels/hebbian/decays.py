"""Decays between the positions of a chunk, without cancellation.

The decay from position j to i is exp(a_{j+1} + ... + a_i). As a difference of cumulative sums it loses everything the
large terms before j rounded away: after thirty steps of 50 a float32 sum is known to 1e-4, and so would be every later
decay. Here each a is cut in two at a fixed power of two, a = high + low. The high parts are multiples of that quantum
and bounded, so their cumulative sums, and the differences of those, are exact in the float format; the low parts are
smaller than the quantum, so their sums err by less than 1e-8. A step below the floor (where exp is zero in the format
anyway) counts as the floor, which is what bounds the high parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class ChunkDecays(NamedTuple):
    """Decay factors of M chunks of C positions, all in [0, 1]; resets inside the chunk are already cut out.

    between (B, H, M, C, C): [..., i, j] from position j to i, 0 for j > i and across a reset.
    from_entry (B, H, M, C): from before the chunk to position i. to_exit (B, H, M, C): from j to the chunk's end.
    log_whole (B, H, M): log decay over the whole chunk. survives (B, M): whether the incoming state reaches the
    chunk's end, None without resets.
    """

    between: jax.Array
    from_entry: jax.Array
    to_exit: jax.Array
    log_whole: jax.Array
    survives: jax.Array | None


def split_sums(log_decay: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cumulative sums along the last axis as an exact high part and a small low part (see the module)."""
    info = jnp.finfo(log_decay.dtype)
    # exp(floor) is below half the smallest subnormal: exactly zero. 128 for float32, 1024 for float64.
    floor = 2.0 ** math.ceil(math.log2(-math.log(float(info.smallest_subnormal)) + 1))
    # The largest sum, floor * C, still has to be a whole number of quanta that the mantissa holds.
    quantum = 2.0 ** (math.ceil(math.log2(floor * log_decay.shape[-1])) - info.nmant - 1)
    clipped = jnp.maximum(log_decay, -floor)
    high = jnp.ceil(clipped / quantum) * quantum
    return jnp.cumsum(high, axis=-1), jnp.cumsum(clipped - high, axis=-1)


def chunk_decays(log_decay_BxHxMxC: jax.Array, reset_BxMxC: jax.Array | None) -> ChunkDecays:
    """All decays of every chunk from the log decays (<= 0) of its tokens and the resets before them."""
    high, low = split_sums(log_decay_BxHxMxC)
    chunk = log_decay_BxHxMxC.shape[-1]
    reached = jnp.tril(jnp.ones((chunk, chunk), bool))
    log_between = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    log_from_entry = high + low
    log_to_exit = (high[..., -1:] - high) + (low[..., -1:] - low)
    survives = None
    if reset_BxMxC is not None:
        document_BxMxC = jnp.cumsum(reset_BxMxC, axis=-1)
        same = document_BxMxC[..., :, None] == document_BxMxC[..., None, :]
        reached = reached & same[:, None]
        survives = document_BxMxC[..., -1] == 0
        log_from_entry = jnp.where((document_BxMxC == 0)[:, None], log_from_entry, -jnp.inf)
        log_to_exit = jnp.where((document_BxMxC == document_BxMxC[..., -1:])[:, None], log_to_exit, -jnp.inf)
    return ChunkDecays(
        # Masked before exp: above the diagonal the sums are positive and exp would overflow.
        between=jnp.exp(jnp.where(reached, jnp.minimum(log_between, 0), -jnp.inf)),
        from_entry=jnp.exp(jnp.minimum(log_from_entry, 0)),
        to_exit=jnp.exp(jnp.minimum(log_to_exit, 0)),
        log_whole=(high + low)[..., -1],
        survives=survives,
    )


def decayed(log_decay: jax.Array, x: jax.Array) -> jax.Array:
    """exp(log_decay) x, as x + expm1(log_decay) x where the decay is slow.

    exp of a small number rounds towards one by up to 3e-8 in float32, the same way in every step of a slow constant
    decay; over thousands of steps that would add up. expm1 has no such bias.
    """
    slow = log_decay > -0.5
    return jnp.where(slow, x + jnp.expm1(jnp.where(slow, log_decay, 0)) * x, jnp.exp(log_decay) * x)


def log_decay_cotangent(pairs, from_entry, to_exit, through) -> jax.Array:
    """Cotangent of the log decays from the products that each decay takes part in.

    pairs_ij: cotangent times value of the path from token j to readout i; from_entry_i: from the entry state to readout
    i; to_exit_j: from token j to the exit state; through: from entry to exit. The decay of token t lies on the paths
    with j < t <= i. They are summed as such: the usual short cut, differences of row and column sums, cancels.
    """
    chunk = pairs.shape[-1]
    at_or_after = jnp.triu(jnp.ones((chunk, chunk), pairs.dtype))
    strictly_before = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    precise = jax.lax.Precision.HIGHEST
    later = jnp.einsum("ti,bhmij->bhmtj", at_or_after, pairs, precision=precise)
    inside = jnp.sum(jnp.where(strictly_before, later, 0), axis=-1)
    read = jnp.einsum("ti,bhmi->bhmt", at_or_after, from_entry, precision=precise)
    stored = jnp.einsum("jt,bhmj->bhmt", at_or_after - jnp.eye(chunk, dtype=pairs.dtype), to_exit, precision=precise)
    return inside + read + stored + through[..., None]

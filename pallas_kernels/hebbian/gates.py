"""What the sweeps of the fused forms need of the decays, and what becomes of their results for the decays' cotangent.

Sums of log2 decays inside chunks come as an exact high and a small low part (`decays.split_sums` says why): the decay
between two positions of a chunk is then one subtraction and one exp2 in a kernel. A reset is a decay below the smallest
float, exactly zero after exp2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunking import pad_tokens

CHUNK = 64
# Chunks from one stored state to the next; also the grain in which long sequences are cut into segments.
ANCHOR = 4

# exp2 of this is zero in float32, with or without subnormals.
FLOOR = -160.0
# 64 steps of 160 are 10,240 < 2**14: every partial sum is a whole number of quanta that 24 bits hold.
QUANTUM = 2.0**-10

# Decays inside a chunk down to 2**-RANGE may be factored: their inverses, and products of them with what a sum or a
# square of inputs makes up to 2**(128 - RANGE), stay inside the floats.
RANGE = 48.0


class Gates(NamedTuple):
    """rows (B, H, M, 3, C): high and low part of the inclusive sums of log2 decays in each chunk, and eta; one array,
    as kernels fetch all three together.
    """

    rows: jax.Array

    @property
    def sums(self) -> jax.Array:
        """(B, H, M, 2, C)."""
        return self.rows[..., :2, :]

    @property
    def eta(self) -> jax.Array:
        """(B, H, M, C)."""
        return self.rows[..., 2, :]


def _to_chunks(x_BxNxH: jax.Array) -> jax.Array:
    """(B, N, H) to (B, H, M, C), zeros at the end."""
    padded = jnp.moveaxis(pad_tokens(x_BxNxH, CHUNK), 1, 2)
    return padded.reshape(*padded.shape[:2], -1, CHUNK)


def prepare(log_decay_BxNxH: jax.Array, eta_BxNxH: jax.Array, reset_BxN: jax.Array | None) -> Gates:
    """Gates of all chunks, float32; tokens added at the end neither decay nor write."""
    log2_decay = jnp.maximum(log_decay_BxNxH * math.log2(math.e), FLOOR)
    if reset_BxN is not None:
        log2_decay = jnp.where(reset_BxN[..., None], FLOOR, log2_decay)
    steps = _to_chunks(log2_decay)
    high = jnp.ceil(steps / QUANTUM) * QUANTUM
    # A product with ones in full float32: exact for the high parts, and one launch, not several.
    ones = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))
    sums = jnp.matmul(jnp.stack([high, steps - high], axis=-2), ones, precision=jax.lax.Precision.HIGHEST)
    return Gates(jnp.concatenate([sums, _to_chunks(eta_BxNxH)[..., None, :]], axis=-2))


def log_wholes(gates: Gates) -> jax.Array:
    """(B, H, M): natural log decay over every chunk."""
    return jnp.sum(gates.sums[..., -1], axis=-1) * math.log(2)


class Paths(NamedTuple):
    """What the backward's sweeps leave of the paths from a write to a readout, float32.

    inside (P, B, H, M, C): for every token those from before it, in its chunk, to it or later in its chunk. read
    (P, B, H, M, C), stored (Q, B, H, M, C): those from the entering state to a token's readout, and from its write to
    the leaving state. deta (Q, B, H, M, C): all from its write, without eta. anchors (R, B, H, A, K): those that pass
    the entry of every ANCHOR-th chunk, in K parts. The first axis of each is to be summed over.
    """

    inside: jax.Array
    read: jax.Array
    stored: jax.Array
    deta: jax.Array
    anchors: jax.Array


def collect(paths: Paths, gates: Gates, num_tokens: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Cotangents (B, N, H) of the log decays and of eta, from what the backward's sweeps left.

    That of the decay at t is the sum over all paths from a write before t to a readout at t or after. The sums over
    whole chunks between two anchors follow from what is read and written in them; over longer stretches such
    differences would cancel, and they say nothing where less of a state survives a chunk than dtype, that of the
    products in the sweeps, can resolve.
    """
    inside, read, stored, deta = (jnp.sum(x, axis=0) for x in paths[:4])
    anchors = jnp.sum(paths.anchors, axis=(0, -1))
    ones = jnp.ones((CHUNK, CHUNK), jnp.float32)
    precise = jax.lax.Precision.HIGHEST
    total = inside + jnp.matmul(read, jnp.tril(ones), precision=precise)
    total = total + jnp.matmul(stored, jnp.triu(ones, 1), precision=precise)
    batch, heads, chunks, _ = inside.shape
    survives = log_wholes(gates) > math.log(float(jnp.finfo(dtype).eps) / 2)

    def of_blocks(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, -chunks % ANCHOR))).reshape(batch, heads, -1, ANCHOR)

    reads, writes, survives = (of_blocks(x) for x in (jnp.sum(read, -1), jnp.sum(stored, -1), survives))
    entering, through = anchors, []
    for position in range(ANCHOR):
        through.append(jnp.where(survives[..., position], entering - reads[..., position], 0))
        entering = through[-1] + writes[..., position]
    total = total + jnp.stack(through, axis=-1).reshape(batch, heads, -1)[..., :chunks, None]
    dlog_decay, deta = (jnp.moveaxis(x.reshape(batch, heads, -1), 2, 1) for x in (total, deta))
    return dlog_decay[:, :num_tokens], deta[:, :num_tokens]

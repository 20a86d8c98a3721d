"""`sweep.join_segments` as one Triton kernel, where XLA takes ten launches."""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.hebbian.gates import CHUNK, Gates
from pallas_kernels.triton_call import launch

# Elements that a program holds: 32 a thread, twice.
_TILE = 8192
# Chunks of each segment whose decays it reads at once.
_STEPS = 64


@triton.jit
def _follow(decay, added, later_decay, later_added):
    """Two stretches in a row as one: how much of a state passes, and what they add to it."""
    return decay * later_decay, added * later_decay + later_added


@triton.jit
def join_kernel(
    local,
    carried,
    rows,
    starts,
    CHUNKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    STEPS: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
):
    stream = (tl.program_id(0) // (SIZE // BLOCK)).to(tl.int64)
    place = tl.program_id(0) % (SIZE // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    # In the order in which the state passes them.
    order = tl.arange(0, ALL)
    if REVERSE:
        segment = SEGMENTS - 1 - order
        following = segment - 1
    else:
        segment = order
        following = segment + 1
    sums = tl.zeros([ALL], tl.float32)
    for first_step in range(0, SEGMENT, STEPS):
        step = first_step + tl.arange(0, STEPS)
        chunk = segment[:, None] * SEGMENT + step[None, :]
        real = (order < SEGMENTS)[:, None] & (step < SEGMENT)[None, :] & (chunk < CHUNKS)
        last = rows + (stream * CHUNKS + chunk) * 3 * C + C - 1
        sums += tl.sum(tl.load(last, mask=real, other=0.0) + tl.load(last + C, mask=real, other=0.0), axis=1)
    decay = tl.exp2(sums)
    states = stream * SEGMENTS * SIZE + place
    added = tl.load(local + states[None, :] + segment[:, None] * SIZE, mask=(order < SEGMENTS)[:, None], other=0.0)
    first = tl.load(carried + stream * SIZE + place)
    decay, added = tl.associative_scan((decay[:, None] + tl.zeros_like(added), added), 0, _follow)
    after = added + decay * first[None, :]
    tl.store(starts + states[None, :] + following[:, None] * SIZE, after, mask=(order < SEGMENTS - 1)[:, None])
    tl.store(starts + states + (SEGMENTS - 1 if REVERSE else 0) * SIZE, first)


def join(local: jax.Array, carried: jax.Array, gates: Gates, segment: int, reverse: bool) -> jax.Array:
    """`sweep.join_segments`: the state (B, H, S, K, V) that enters every segment of so many chunks."""
    batch, heads, segments, keys, values = local.shape
    size, every = keys * values, triton.next_power_of_2(segments)
    block = min(math.gcd(size, 1 << 20), max(_TILE // every, 16))
    (starts,) = launch(
        join_kernel,
        (local, carried, gates.rows),
        (jax.ShapeDtypeStruct(local.shape, jnp.float32),),
        grid=(batch * heads * (size // block),),
        num_warps=8,
        CHUNKS=gates.eta.shape[2],
        SEGMENT=segment,
        SEGMENTS=segments,
        SIZE=size,
        BLOCK=block,
        ALL=every,
        STEPS=min(triton.next_power_of_2(segment), _STEPS),
        C=CHUNK,
        REVERSE=reverse,
    )
    return starts

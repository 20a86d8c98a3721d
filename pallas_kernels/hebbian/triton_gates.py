"""`gates.prepare` and `gates.collect` as one Triton kernel each.

Both are bound by launches and memory: gates are (B, N, H) outside and (B, H, M, C) inside, so that a program takes
some neighbouring heads, and both its loads and its stores are of whole sectors.
"""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, FLOOR, QUANTUM, Gates, Paths
from pallas_kernels.triton_call import launch

# A sector of 32 bytes in float32; more would leave too few programs for a device.
_HEADS_AT_ONCE = 8


@triton.jit
def prepare_kernel(
    log_decay,
    eta,
    reset,
    rows,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    RESET: tl.constexpr,
    LOG2_E: tl.constexpr,
    FLOOR: tl.constexpr,
    QUANTUM: tl.constexpr,
):
    # One axis for all: only the first may pass 65,535 programs.
    blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(0) // blocks // CHUNKS).to(tl.int64)
    chunk = tl.program_id(0) // blocks % CHUNKS
    place = tl.arange(0, C)
    token = chunk * C + place
    mask = (token < TOKENS)[:, None] & (head < HEADS)[None, :]
    offsets = (batch * TOKENS + token)[:, None] * HEADS + head[None, :]
    strength = tl.load(eta + offsets, mask=mask, other=0.0)
    steps = tl.load(log_decay + offsets, mask=mask, other=0.0) * LOG2_E
    # As jnp.maximum: a decay that is not a number must not pass for the floor.
    steps = tl.maximum(steps, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    if RESET:
        wiped = tl.load(reset + batch * TOKENS + token, mask=token < TOKENS, other=0)
        steps = tl.where(wiped[:, None] != 0, FLOOR, steps)
    # The product with a power of two is exact, Triton's division is not.
    high = tl.ceil(steps * (1 / QUANTUM)) * QUANTUM
    chunk_rows = ((batch * HEADS + head) * CHUNKS + chunk) * 3 * C
    targets = rows + chunk_rows[None, :] + place[:, None]
    tl.store(targets, tl.cumsum(high, axis=0), mask=(head < HEADS)[None, :])
    tl.store(targets + C, tl.cumsum(steps - high, axis=0), mask=(head < HEADS)[None, :])
    tl.store(targets + 2 * C, strength, mask=(head < HEADS)[None, :])


@triton.jit
def _summed(parts, offsets, mask, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """The sum over the first axis of an array of PARTS times SIZE elements, at offsets into the others."""
    total = tl.load(parts + offsets, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * SIZE + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def _joined(before, whole, later_before, later_whole):
    """Sums of all but the last and of all elements, of two stretches in a row: nothing is subtracted."""
    return whole + later_before, whole + later_whole


@triton.jit
def collect_kernel(
    inside,
    read,
    stored,
    deta,
    anchors,
    rows,
    dlog_decay_out,
    deta_out,
    TOKENS: tl.constexpr,
    STREAMS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    EVERY: tl.constexpr,
    K: tl.constexpr,
    READ_PARTS: tl.constexpr,
    STORED_PARTS: tl.constexpr,
    ANCHOR_PARTS: tl.constexpr,
    LOG_2: tl.constexpr,
    LIMIT: tl.constexpr,
):
    blocks: tl.constexpr = (HEADS + BLOCK - 1) // BLOCK
    blocks_of_chunks: tl.constexpr = (CHUNKS + EVERY - 1) // EVERY
    size: tl.constexpr = STREAMS * CHUNKS * C
    head = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    batch = (tl.program_id(0) // blocks // blocks_of_chunks).to(tl.int64)
    anchor = tl.program_id(0) // blocks % blocks_of_chunks
    stream = batch * HEADS + head
    place = tl.arange(0, C)
    keys = tl.arange(0, K)
    entries = (stream * blocks_of_chunks + anchor)[:, None] * K + keys[None, :]
    entering = _summed(anchors, entries, (head < HEADS)[:, None], STREAMS * blocks_of_chunks * K, ANCHOR_PARTS)
    # All loads before the first store, as none moves across one.
    loaded = ()
    for position in tl.static_range(EVERY):
        chunk = anchor * EVERY + position
        known = (head < HEADS) & (chunk < CHUNKS)
        offsets = ((stream * CHUNKS + chunk) * C)[:, None] + place[None, :]
        inside_tile = _summed(inside, offsets, known[:, None], size, READ_PARTS)
        read_tile = _summed(read, offsets, known[:, None], size, READ_PARTS)
        stored_tile = _summed(stored, offsets, known[:, None], size, STORED_PARTS)
        deta_tile = _summed(deta, offsets, known[:, None], size, STORED_PARTS)
        last = rows + (stream * CHUNKS + chunk) * 3 * C + C - 1
        whole = tl.load(last, mask=known, other=0.0) + tl.load(last + C, mask=known, other=0.0)
        loaded = loaded + ((inside_tile, read_tile, stored_tile, deta_tile, whole),)  # noqa: RUF005 - not in Triton
    entering = tl.sum(entering, axis=1)
    for position in tl.static_range(EVERY):
        inside_tile, read_tile, stored_tile, deta_tile, whole = loaded[position]  # pyright: ignore[reportAssignmentType]
        total = inside_tile + tl.cumsum(read_tile, axis=1, reverse=True)
        before = tl.associative_scan((tl.zeros_like(stored_tile), stored_tile), 1, _joined)[0]
        through = tl.where(whole * LOG_2 > LIMIT, entering - tl.sum(read_tile, axis=1), 0.0)
        entering = through + tl.sum(stored_tile, axis=1)
        token = (anchor * EVERY + position) * C + place
        mask = (head < HEADS)[:, None] & (token < TOKENS)[None, :]
        targets = (batch * TOKENS + token)[None, :] * HEADS + head[:, None]
        tl.store(dlog_decay_out + targets, total + before + through[:, None], mask=mask)
        tl.store(deta_out + targets, deta_tile, mask=mask)


def _block(heads: int) -> int:
    return min(triton.next_power_of_2(heads), _HEADS_AT_ONCE)


def prepare(log_decay_BxNxH: jax.Array, eta_BxNxH: jax.Array, reset_BxN: jax.Array | None) -> Gates:
    """`gates.prepare`: rows (B, H, M, 3, C) float32."""
    batch, tokens, heads = log_decay_BxNxH.shape
    chunks, block = -(-tokens // CHUNK), _block(heads)
    (rows,) = launch(
        prepare_kernel,
        (log_decay_BxNxH, eta_BxNxH, log_decay_BxNxH if reset_BxN is None else reset_BxN),
        (jax.ShapeDtypeStruct((batch, heads, chunks, 3, CHUNK), jnp.float32),),
        grid=(batch * chunks * -(-heads // block),),
        num_warps=max(block // 4, 1),
        TOKENS=tokens,
        HEADS=heads,
        CHUNKS=chunks,
        BLOCK=block,
        C=CHUNK,
        RESET=reset_BxN is not None,
        LOG2_E=math.log2(math.e),
        FLOOR=FLOOR,
        QUANTUM=QUANTUM,
    )
    return Gates(rows)


def collect(paths: Paths, gates: Gates, num_tokens: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`gates.collect`: cotangents (B, N, H) float32 of the log decays and of eta; K a power of two."""
    batch, heads, chunks, _ = gates.eta.shape
    block = _block(heads)
    result = jax.ShapeDtypeStruct((batch, num_tokens, heads), jnp.float32)
    dlog_decay, deta = launch(
        collect_kernel,
        (*paths, gates.rows),
        (result, result),
        grid=(batch * -(-chunks // ANCHOR) * -(-heads // block),),
        num_warps=max(block // 2, 1),
        TOKENS=num_tokens,
        STREAMS=batch * heads,
        HEADS=heads,
        CHUNKS=chunks,
        BLOCK=block,
        C=CHUNK,
        EVERY=ANCHOR,
        K=paths.anchors.shape[-1],
        READ_PARTS=paths.read.shape[0],
        STORED_PARTS=paths.stored.shape[0],
        ANCHOR_PARTS=paths.anchors.shape[0],
        LOG_2=math.log(2),
        LIMIT=math.log(float(jnp.finfo(dtype).eps) / 2),
    )
    return dlog_decay, deta

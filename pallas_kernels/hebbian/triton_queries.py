"""The Triton backward that walks from states the forward left, in order of time: dq."""

# Triton comes with the GPU extras; without it nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.hebbian.triton_tiles import decayed, load_gates


@triton.jit
def queries_kernel(
    q,
    k,
    v,
    dy,
    gates,
    entries,
    dq,
    read,
    inside,
    STREAMS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    C: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0) % (WIDTH // BLOCK)
    stream = (tl.program_id(0) // (WIDTH // BLOCK)).to(tl.int64)
    batch = stream // HEADS
    head = stream % HEADS
    dtype = v.dtype.element_ty
    place = tl.arange(0, C)
    values = tl.arange(0, WIDTH)
    keys = block * BLOCK + tl.arange(0, BLOCK)
    anchors: tl.constexpr = (CHUNKS + EVERY - 1) // EVERY
    key_offsets = place[:, None] * HEADS * WIDTH + keys[None, :]
    value_offsets = place[:, None] * HEADS * WIDTH + values[None, :]
    # Transposed, values by keys: all products then take it as it is.
    state_offsets = keys[None, :] * WIDTH + values[:, None]
    first = tl.program_id(1) * SPLIT
    anchor = (stream * anchors + first // EVERY) * WIDTH * WIDTH
    state = tl.load(entries + anchor + state_offsets).to(tl.float32)
    for step in range(tl.minimum(SPLIT, CHUNKS - first)):
        chunk = first + step
        tokens = (batch * CHUNKS + chunk) * C * HEADS + head
        dy_tile = tl.load(dy + tokens * WIDTH + value_offsets)
        v_tile = tl.load(v + tokens * WIDTH + value_offsets)
        k_tile = tl.load(k + tokens * WIDTH + key_offsets)
        q_tile = tl.load(q + tokens * WIDTH + key_offsets)
        high, low, strength, from_entry, to_exit, whole = load_gates(gates, stream * CHUNKS + chunk, C)
        from_state = tl.dot(dy_tile, state.to(dtype), input_precision=PRECISION) * from_entry[:, None]
        vectors = ((block * STREAMS + stream) * CHUNKS + chunk) * C
        tl.store(read + vectors + place, tl.sum(q_tile.to(tl.float32) * from_state, axis=1))
        scores = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION)
        scores = decayed(scores, high, low, C, False) * strength[None, :]
        # Paths to this token or later from those written before it: first the sums over the written ones.
        pairs = scores * tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        before = (place[:, None] < place[None, :]).to(dtype)
        earlier = tl.dot(pairs.to(dtype), before, input_precision=PRECISION)
        tl.store(inside + vectors + place, tl.sum(tl.where(place[:, None] >= place[None, :], earlier, 0.0), axis=0))
        result = from_state + tl.dot(scores.to(dtype), k_tile, input_precision=PRECISION)
        tl.store(dq + tokens * WIDTH + key_offsets, result.to(dtype))
        weighted = (k_tile.to(tl.float32) * (to_exit * strength)[:, None]).to(dtype)
        state = state * whole + tl.dot(tl.trans(v_tile), weighted, input_precision=PRECISION)

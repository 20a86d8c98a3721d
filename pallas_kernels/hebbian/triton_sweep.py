"""The Triton forward: a segment's chunks one after the other, for some values of one head of one batch row."""

# Triton comes with the GPU extras; without it nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.hebbian.triton_tiles import decayed, load_gates


@triton.jit
def sweep_kernel(
    a,
    b,
    c,
    gates,
    start,
    out,
    end,
    states,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    C: tl.constexpr,
    EVERY: tl.constexpr,
    REVERSE: tl.constexpr,
    STATES: tl.constexpr,
    OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One axis for both: only the first may pass 65,535 programs.
    block = tl.program_id(0) % (V // BV)
    stream = (tl.program_id(0) // (V // BV)).to(tl.int64)
    segment = tl.program_id(1)
    batch = stream // HEADS
    head = stream % HEADS
    dtype = b.dtype.element_ty
    place = tl.arange(0, C)
    keys = tl.arange(0, K)
    values = block * BV + tl.arange(0, BV)
    anchors: tl.constexpr = (CHUNKS + EVERY - 1) // EVERY
    # Within a chunk and a state: small, and the same in every step.
    key_offsets = place[:, None] * HEADS * K + keys[None, :]
    value_offsets = place[:, None] * HEADS * V + values[None, :]
    state_offsets = keys[:, None] * V + values[None, :]
    segment_state = (stream * SEGMENTS + segment) * K * V
    state = tl.load(start + segment_state + state_offsets)
    first = segment * SEGMENT
    steps = tl.minimum(SEGMENT, CHUNKS - first)
    for step in range(steps):
        chunk = first + step
        if REVERSE:
            chunk = first + steps - 1 - step
        tokens = (batch * CHUNKS + chunk) * C * HEADS + head
        b_tile = tl.load(b + tokens * K + key_offsets)
        c_tile = tl.load(c + tokens * V + value_offsets)
        high, low, strength, from_entry, to_exit, whole = load_gates(gates, stream * CHUNKS + chunk, C)
        if STATES:  # noqa: SIM102 - the first condition is known at compile time
            if chunk % EVERY == 0:
                anchor = (stream * anchors + chunk // EVERY) * K * V
                tl.store(states + anchor + state_offsets, state.to(dtype))
        if OUTPUT:
            a_tile = tl.load(a + tokens * K + key_offsets)
            scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)
            scores = decayed(scores, high, low, C, False) * strength[None, :]
            from_state = tl.dot(a_tile, state.to(dtype), input_precision=PRECISION) * from_entry[:, None]
            result = from_state + tl.dot(scores.to(dtype), c_tile, input_precision=PRECISION)
            tl.store(out + tokens * V + value_offsets, result.to(dtype))
        if REVERSE:
            leave = from_entry
        else:
            leave = to_exit * strength
        weighted = (c_tile.to(tl.float32) * leave[:, None]).to(dtype)
        state = state * whole + tl.dot(tl.trans(b_tile), weighted, input_precision=PRECISION)
    tl.store(end + segment_state + state_offsets, state)

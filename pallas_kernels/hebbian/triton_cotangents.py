"""The Triton backward that carries the state's cotangent against time: dk, dv."""

# Triton comes with the GPU extras; without it nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.hebbian.triton_tiles import decayed, load_gates


@triton.jit
def _keys_walk(
    q,
    v,
    dy,
    gates,
    entries,
    dk,
    products,
    state,
    stream,
    batch,
    head,
    keys,
    first,
    steps,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some keys of dk against time; state is G (keys, values), which it returns as it is before the first chunk."""
    dtype = v.dtype.element_ty
    place = tl.arange(0, C)
    values = tl.arange(0, WIDTH)
    anchors: tl.constexpr = (CHUNKS + EVERY - 1) // EVERY
    key_offsets = place[:, None] * HEADS * WIDTH + keys[None, :]
    transposed_offsets = place[None, :] * HEADS * WIDTH + keys[:, None]
    value_offsets = place[:, None] * HEADS * WIDTH + values[None, :]
    state_offsets = keys[:, None] * WIDTH + values[None, :]
    for step in range(steps):
        chunk = first + steps - 1 - step
        tokens = (batch * CHUNKS + chunk) * C * HEADS + head
        q_tile = tl.load(q + tokens * WIDTH + key_offsets)
        v_tile = tl.load(v + tokens * WIDTH + value_offsets)
        dy_tile = tl.load(dy + tokens * WIDTH + value_offsets)
        high, low, strength, from_entry, to_exit, whole = load_gates(gates, stream * CHUNKS + chunk, C)
        # dk transposed, keys by tokens: no product then takes a transposed result, of which Triton 3.6 makes wrong code
        # on Hopper. Rows of `along` are the reading tokens.
        along = decayed(tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION), high, low, C, False)
        result = tl.dot(state.to(dtype), tl.trans(v_tile), input_precision=PRECISION) * to_exit[None, :]
        result += tl.dot(tl.trans(q_tile), along.to(dtype), input_precision=PRECISION)
        tl.store(dk + tokens * WIDTH + transposed_offsets, (result * strength[None, :]).to(dtype))
        weighted = (dy_tile.to(tl.float32) * from_entry[:, None]).to(dtype)
        state = state * whole + tl.dot(tl.trans(q_tile), weighted, input_precision=PRECISION)
        if chunk % EVERY == 0:
            anchor = stream * anchors + chunk // EVERY
            entry = tl.load(entries + anchor * WIDTH * WIDTH + state_offsets).to(tl.float32)
            tl.store(products + anchor * WIDTH + keys, tl.sum(entry * state, axis=1))
    return state


@triton.jit
def _values_walk(
    q,
    k,
    v,
    dy,
    gates,
    dv,
    stored,
    deta,
    state,
    stream,
    part,
    batch,
    head,
    values,
    first,
    steps,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some values of dv against time; state is G (keys, values), part where their share of what is stored belongs."""
    dtype = v.dtype.element_ty
    place = tl.arange(0, C)
    keys = tl.arange(0, WIDTH)
    key_offsets = place[:, None] * HEADS * WIDTH + keys[None, :]
    value_offsets = place[:, None] * HEADS * WIDTH + values[None, :]
    for step in range(steps):
        chunk = first + steps - 1 - step
        tokens = (batch * CHUNKS + chunk) * C * HEADS + head
        q_tile = tl.load(q + tokens * WIDTH + key_offsets)
        k_tile = tl.load(k + tokens * WIDTH + key_offsets)
        v_tile = tl.load(v + tokens * WIDTH + value_offsets)
        dy_tile = tl.load(dy + tokens * WIDTH + value_offsets)
        high, low, strength, from_entry, to_exit, whole = load_gates(gates, stream * CHUNKS + chunk, C)
        # Rows are written tokens, columns the later ones that read them.
        scores = decayed(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), high, low, C, True)
        of_state = tl.dot(k_tile, state.to(dtype), input_precision=PRECISION) * to_exit[:, None]
        result = of_state + tl.dot(scores.to(dtype), dy_tile, input_precision=PRECISION)
        tl.store(dv + tokens * WIDTH + value_offsets, (result * strength[:, None]).to(dtype))
        vectors = (part * CHUNKS + chunk) * C + place
        written = v_tile.to(tl.float32)
        tl.store(stored + vectors, tl.sum(written * of_state, axis=1) * strength)
        tl.store(deta + vectors, tl.sum(written * result, axis=1))
        weighted = (dy_tile.to(tl.float32) * from_entry[:, None]).to(dtype)
        state = state * whole + tl.dot(tl.trans(q_tile), weighted, input_precision=PRECISION)


@triton.jit
def cotangents_kernel(
    q,
    k,
    v,
    dy,
    gates,
    entries,
    end,
    dk,
    dv,
    start,
    stored,
    deta,
    products,
    STREAMS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    C: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Programs for dk and for dv side by side: each is a chain of products, and together they fill the device.
    side = tl.program_id(0) % 2
    block = tl.program_id(0) // 2 % (WIDTH // BLOCK)
    stream = (tl.program_id(0) // (2 * (WIDTH // BLOCK))).to(tl.int64)
    segment = tl.program_id(1)
    batch = stream // HEADS
    head = stream % HEADS
    every = tl.arange(0, WIDTH)
    some = block * BLOCK + tl.arange(0, BLOCK)
    segment_state = (stream * SEGMENTS + segment) * WIDTH * WIDTH
    first = segment * SEGMENT
    steps = tl.minimum(SEGMENT, CHUNKS - first)
    # fmt: off
    if side == 0:
        rows = segment_state + some[:, None] * WIDTH + every[None, :]
        before = _keys_walk(
            q, v, dy, gates, entries, dk, products, tl.load(end + rows), stream, batch, head, some, first, steps,
            HEADS, CHUNKS, WIDTH, C, EVERY, PRECISION,
        )
        tl.store(start + rows, before)
    else:
        columns = segment_state + every[:, None] * WIDTH + some[None, :]
        _values_walk(
            q, k, v, dy, gates, dv, stored, deta, tl.load(end + columns), stream, block * STREAMS + stream, batch, head,
            some, first, steps, HEADS, CHUNKS, WIDTH, C, PRECISION,
        )
    # fmt: on

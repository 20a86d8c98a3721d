"""The fused form as Triton kernels through jax-triton, for NVIDIA GPUs from sm_80, also in float32.

The tiles are those of `tiled.py`; Triton places them in registers and shared memory itself.
"""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.sweep import (
    Cotangents,
    Fused,
    Kind,
    Operands,
    Plan,
    Pulled,
    Swept,
    cotangent_types,
    segment_chunks,
    swept_types,
)
from pallas_kernels.triton_call import launch


@triton.jit
def _load_gates(gates, chunk, C: tl.constexpr):
    """High and low sums, eta, and the decays from the entry, to the exit and over the whole of a chunk."""
    rows = gates + chunk * 3 * C
    place = tl.arange(0, C)
    high = tl.load(rows + place)
    low = tl.load(rows + C + place)
    strength = tl.load(rows + 2 * C + place)
    last_high = tl.load(rows + C - 1)
    last_low = tl.load(rows + 2 * C - 1)
    from_entry = tl.exp2(high + low)
    to_exit = tl.exp2((last_high - high) + (last_low - low))
    return high, low, strength, from_entry, to_exit, tl.exp2(last_high + last_low)


@triton.jit
def _decayed(scores, high, low, C: tl.constexpr, LATER: tl.constexpr):
    """Scores times the decays from column to row, with LATER from row to column; 0 where time would run backwards."""
    place = tl.arange(0, C)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    # Masked after exp2, which overflows on the other side of the diagonal.
    if LATER:
        return tl.where(place[None, :] >= place[:, None], scores * tl.exp2(-between), 0.0)
    else:
        return tl.where(place[None, :] <= place[:, None], scores * tl.exp2(between), 0.0)


@triton.jit
def _sweep_kernel(
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
        high, low, strength, from_entry, to_exit, whole = _load_gates(gates, stream * CHUNKS + chunk, C)
        if STATES:  # noqa: SIM102 - the first condition is known at compile time
            if chunk % EVERY == 0:
                anchor = (stream * anchors + chunk // EVERY) * K * V
                tl.store(states + anchor + state_offsets, state.to(dtype))
        if OUTPUT:
            a_tile = tl.load(a + tokens * K + key_offsets)
            scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)
            scores = _decayed(scores, high, low, C, False) * strength[None, :]
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


@triton.jit
def _queries_kernel(
    q,
    k,
    v,
    dy,
    gates,
    entries,
    dq,
    read,
    STREAMS: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    C: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0) % (WIDTH // BK)
    stream = (tl.program_id(0) // (WIDTH // BK)).to(tl.int64)
    batch = stream // HEADS
    head = stream % HEADS
    dtype = v.dtype.element_ty
    place = tl.arange(0, C)
    values = tl.arange(0, WIDTH)
    keys = block * BK + tl.arange(0, BK)
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
        high, low, strength, from_entry, to_exit, whole = _load_gates(gates, stream * CHUNKS + chunk, C)
        from_state = tl.dot(dy_tile, state.to(dtype), input_precision=PRECISION) * from_entry[:, None]
        vectors = ((block * STREAMS + stream) * CHUNKS + chunk) * C
        tl.store(read + vectors + place, tl.sum(q_tile.to(tl.float32) * from_state, axis=1))
        scores = tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION)
        scores = _decayed(scores, high, low, C, False) * strength[None, :]
        result = from_state + tl.dot(scores.to(dtype), k_tile, input_precision=PRECISION)
        tl.store(dq + tokens * WIDTH + key_offsets, result.to(dtype))
        weighted = (k_tile.to(tl.float32) * (to_exit * strength)[:, None]).to(dtype)
        state = state * whole + tl.dot(tl.trans(v_tile), weighted, input_precision=PRECISION)


@triton.jit
def _cotangents_kernel(
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
    inside,
    stored,
    deta,
    products,
    HEADS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    C: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    stream = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    batch = stream // HEADS
    head = stream % HEADS
    dtype = v.dtype.element_ty
    place = tl.arange(0, C)
    width = tl.arange(0, WIDTH)
    anchors: tl.constexpr = (CHUNKS + EVERY - 1) // EVERY
    offsets = place[:, None] * HEADS * WIDTH + width[None, :]
    transposed_offsets = place[None, :] * HEADS * WIDTH + width[:, None]
    state_offsets = width[:, None] * WIDTH + width[None, :]
    segment_state = (stream * SEGMENTS + segment) * WIDTH * WIDTH
    state = tl.load(end + segment_state + state_offsets)
    first = segment * SEGMENT
    steps = tl.minimum(SEGMENT, CHUNKS - first)
    for step in range(steps):
        chunk = first + steps - 1 - step
        tokens = (batch * CHUNKS + chunk) * C * HEADS + head
        q_tile = tl.load(q + tokens * WIDTH + offsets)
        k_tile = tl.load(k + tokens * WIDTH + offsets)
        v_tile = tl.load(v + tokens * WIDTH + offsets)
        dy_tile = tl.load(dy + tokens * WIDTH + offsets)
        high, low, strength, from_entry, to_exit, whole = _load_gates(gates, stream * CHUNKS + chunk, C)
        vectors = (stream * CHUNKS + chunk) * C

        # Rows are written tokens, columns the later ones that read them.
        scores = _decayed(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), high, low, C, True)
        pairs = scores * tl.dot(v_tile, tl.trans(dy_tile), input_precision=PRECISION)
        # Those read at a token or after, then of these the ones written before it. Ones as the second operand stay in
        # shared memory; as the first they would be kept in registers throughout.
        at_or_after = (place[:, None] >= place[None, :]).to(dtype)
        later = tl.dot((pairs * strength[:, None]).to(dtype), at_or_after, input_precision=PRECISION)
        tl.store(inside + vectors + place, tl.sum(tl.where(place[:, None] < place[None, :], later, 0.0), axis=0))

        of_state = tl.dot(k_tile, state.to(dtype), input_precision=PRECISION) * to_exit[:, None]
        # Products with k_j of dk_j's parts, without dk: k_j^T G v_j here, q_i . k_j in the scores.
        through = tl.sum(v_tile.to(tl.float32) * of_state, axis=1)
        tl.store(stored + vectors + place, through * strength)
        tl.store(deta + vectors + place, through + tl.sum(pairs, axis=1))
        result = tl.dot(scores.to(dtype), dy_tile, input_precision=PRECISION) * strength[:, None]
        tl.store(dv + tokens * WIDTH + offsets, (result + of_state * strength[:, None]).to(dtype))

        # dk transposed, keys by tokens: no product then takes a transposed result, of which Triton 3.6 makes wrong code
        # on Hopper. Rows of `along` are the reading tokens.
        along = _decayed(tl.dot(dy_tile, tl.trans(v_tile), input_precision=PRECISION), high, low, C, False)
        result = tl.dot(state.to(dtype), tl.trans(v_tile), input_precision=PRECISION) * to_exit[None, :]
        result += tl.dot(tl.trans(q_tile), along.to(dtype), input_precision=PRECISION)
        tl.store(dk + tokens * WIDTH + transposed_offsets, (result * strength[None, :]).to(dtype))

        weighted = (dy_tile.to(tl.float32) * from_entry[:, None]).to(dtype)
        state = state * whole + tl.dot(tl.trans(q_tile), weighted, input_precision=PRECISION)
        if chunk % EVERY == 0:
            anchor = stream * anchors + chunk // EVERY
            entry = tl.load(entries + anchor * WIDTH * WIDTH + state_offsets).to(tl.float32)
            tl.store(products + anchor * WIDTH + width, tl.sum(entry * state, axis=1))
    tl.store(start + segment_state + state_offsets, state)


def _constants(gates: Gates) -> dict[str, Any]:
    """What all kernels are compiled for.

    tf32x3: of float32, products of three parts on the tensor cores, a tenth of the time of those on the others.
    """
    _, heads, chunks, _ = gates.eta.shape
    return {"HEADS": heads, "CHUNKS": chunks, "C": CHUNK, "EVERY": ANCHOR, "PRECISION": "tf32x3"}


def forward(kind: Kind, operands: Operands, gates: Gates, plan: Plan) -> Swept:
    """A forward kernel of `sweep.Fused`; states of a kind with output, which runs in order of time."""
    batch, heads, _, _ = gates.eta.shape
    values, segments = operands.c.shape[-1], operands.start.shape[2]
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    types = swept_types(kind, operands, gates)
    out, end, states = launch(
        _sweep_kernel,
        (operands.a, operands.b, operands.c, gates.rows, operands.start),
        (types.out or nothing, types.end, types.states or nothing),
        grid=(values // plan.values * batch * heads, segments),
        num_warps=4,
        num_stages=plan.stages,
        K=operands.b.shape[-1],
        V=values,
        BV=plan.values,
        SEGMENT=plan.segment,
        SEGMENTS=segments,
        REVERSE=kind.reverse,
        STATES=kind.states,
        OUTPUT=kind.output,
        **_constants(gates),
    )
    return Swept(out if kind.output else None, end, states if kind.states else None)


def backward(pulled: Pulled, gates: Gates, plan: Plan) -> Cotangents:
    """The backward kernels of `sweep.Fused`; plan.values are the keys of a program that computes dq."""
    batch, heads, chunks, _ = gates.eta.shape
    width, segments = pulled.v.shape[-1], pulled.end.shape[2]
    blocks = width // plan.values
    types = cotangent_types(pulled, gates, blocks)
    tiles = (pulled.q, pulled.k, pulled.v, pulled.dy, gates.rows, pulled.entries)
    anchors = jax.ShapeDtypeStruct((1, *types.anchors.shape[1:]), jnp.float32)
    dk, dv, start, inside, stored, deta, products = launch(
        _cotangents_kernel,
        (*tiles, pulled.end),
        (types.dk, types.dv, types.start, types.inside, types.stored, types.deta, anchors),
        grid=(batch * heads, segments),
        num_warps=8 if width > 64 else 4,
        num_stages=plan.stages,
        WIDTH=width,
        SEGMENT=plan.segment,
        SEGMENTS=segments,
        **_constants(gates),
    )
    dq, read = launch(
        _queries_kernel,
        tiles,
        (types.dq, types.read),
        grid=(blocks * batch * heads, -(-chunks // plan.split)),
        num_warps=4,
        num_stages=plan.stages,
        STREAMS=batch * heads,
        WIDTH=width,
        BK=plan.values,
        SPLIT=plan.split,
        **_constants(gates),
    )
    return Cotangents(dq, dk, dv, start, read, inside, stored, deta, products)


def _block(width: int, itemsize: int) -> int:
    """Columns of the state in a program that shares it with others."""
    return min(width, 64 if itemsize == 2 else 32)


def forward_plan(batch: int, chunks: int, heads: int, width: int, itemsize: int) -> Plan:
    block = _block(width, itemsize)
    stages = 1 if itemsize == 4 else 2 if width <= 64 else 3
    return Plan(block, stages, segment_chunks(chunks, batch * heads * width // block))


def backward_plan(batch: int, chunks: int, heads: int, width: int, itemsize: int) -> Plan:
    block = _block(width, itemsize)
    stages = 1 if itemsize == 4 else 2
    # 16 chunks pay for the first loads of a program; fewer where that would not fill the device twice over.
    split = batch * heads * (width // block) * chunks // 512 // ANCHOR * ANCHOR
    return Plan(block, stages, segment_chunks(chunks, batch * heads), min(max(split, ANCHOR), 16))


FUSED = Fused(forward, backward, forward_plan, backward_plan, widths=(32, 64, 128))

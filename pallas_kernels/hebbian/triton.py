"""The sweeps of the fused form as a Triton kernel through jax-triton, for NVIDIA GPUs from sm_80, also in float32.

The tiles are those of `mosaic.py`; Triton places them in registers and shared memory itself.
"""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.sweep import Fused, Kind, Operands, Plan, Swept, result_types, segment_chunks
from pallas_kernels.triton_call import launch

_COLLECT = {"": 0, "states": 1, "paths": 2, "rows": 3, "anchors": 4}


@triton.jit
def _sweep_kernel(
    a,
    b,
    c,
    x,
    sums,
    eta,
    start,
    out,
    end,
    collected,
    STREAMS: tl.constexpr,
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
    COLLECT: tl.constexpr,
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
    second: tl.constexpr = STREAMS * (V // BV) * CHUNKS * C
    anchors: tl.constexpr = (CHUNKS + EVERY - 1) // EVERY
    state_offsets = keys[:, None] * V + values[None, :]
    segment_state = (stream * SEGMENTS + segment) * K * V
    state = tl.load(start + segment_state + state_offsets)
    first = segment * SEGMENT
    steps = tl.minimum(SEGMENT, CHUNKS - first)
    if REVERSE:
        reached = place[None, :] >= place[:, None]
    else:
        reached = place[None, :] <= place[:, None]
    for step in range(steps):
        chunk = first + step
        if REVERSE:
            chunk = first + steps - 1 - step
        tokens = (batch * CHUNKS * C + chunk * C + place) * HEADS + head
        b_tile = tl.load(b + tokens[:, None] * K + keys[None, :])
        c_tile = tl.load(c + tokens[:, None] * V + values[None, :])
        gates = (stream * CHUNKS + chunk) * C
        high = tl.load(sums + 2 * gates + place)
        low = tl.load(sums + 2 * gates + C + place)
        strength = tl.load(eta + gates + place)
        last_high = tl.load(sums + 2 * gates + C - 1)
        last_low = tl.load(sums + 2 * gates + 2 * C - 1)
        from_entry = tl.exp2(high + low)
        to_exit = tl.exp2((last_high - high) + (last_low - low))
        whole = tl.exp2(last_high + last_low)
        if REVERSE:
            entry = to_exit
            leave = from_entry
        else:
            entry = from_entry
            leave = to_exit * strength
        if COLLECT == 1:  # noqa: SIM102 - the first condition is known at compile time
            if chunk % EVERY == 0:
                anchor = (stream * anchors + chunk // EVERY) * K * V
                tl.store(collected + anchor + state_offsets, state.to(dtype))
        if OUTPUT:
            a_tile = tl.load(a + tokens[:, None] * K + keys[None, :])
            scores = tl.dot(a_tile, tl.trans(b_tile), input_precision=PRECISION)
            between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
            if REVERSE:
                scores = tl.where(reached, scores * tl.exp2(-between), 0.0)
            else:
                scores = tl.where(reached, scores * tl.exp2(between), 0.0) * strength[None, :]
            from_state = tl.dot(a_tile, state.to(dtype), input_precision=PRECISION) * entry[:, None]
            result = from_state + tl.dot(scores.to(dtype), c_tile, input_precision=PRECISION)
            # (part, block of values, stream, chunk, position)
            vectors = (block * STREAMS + stream) * CHUNKS * C + chunk * C + place
            if COLLECT == 2:
                x_tile = tl.load(x + tokens[:, None] * V + values[None, :])
                pairs = scores * tl.dot(x_tile, tl.trans(c_tile), input_precision=PRECISION)
                at_or_after = (place[None, :] >= place[:, None]).to(dtype)
                later = tl.dot(at_or_after, pairs.to(dtype), input_precision=PRECISION)
                inside = tl.sum(tl.where(place[None, :] < place[:, None], later, 0.0), axis=1)
                tl.store(collected + vectors, inside)
                tl.store(collected + second + vectors, tl.sum(x_tile.to(tl.float32) * from_state, axis=1))
            if COLLECT == 3:
                x_tile = tl.load(x + tokens[:, None] * V + values[None, :]).to(tl.float32)
                tl.store(collected + vectors, tl.sum(x_tile * from_state, axis=1) * strength)
                tl.store(collected + second + vectors, tl.sum(x_tile * result, axis=1))
            if REVERSE:
                result = result * strength[:, None]
            tl.store(out + tokens[:, None] * V + values[None, :], result.to(dtype))
        weighted = (c_tile.to(tl.float32) * leave[:, None]).to(dtype)
        state = state * whole + tl.dot(tl.trans(b_tile), weighted, input_precision=PRECISION)
        if COLLECT == 4:  # noqa: SIM102 - likewise
            if chunk % EVERY == 0:
                stored = tl.load(x + (stream * anchors + chunk // EVERY) * K * V + state_offsets).to(tl.float32)
                products = tl.sum(stored * state, axis=1)
                where = ((block * STREAMS + stream) * anchors + chunk // EVERY) * K
                tl.store(collected + where + keys, products)
    tl.store(end + segment_state + state_offsets, state)


def _sweep(kind: Kind, operands: Operands, gates: Gates, plan: Plan) -> Swept:
    batch, heads, chunks, _ = gates.eta.shape
    values, segments = operands.c.shape[-1], operands.start.shape[2]
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    types = result_types(kind, operands, gates, plan)
    inputs = (operands.a, operands.b, operands.c, operands.start if operands.x is None else operands.x)
    swept, end, collected = launch(
        _sweep_kernel,
        (*inputs, gates.sums, gates.eta, operands.start),
        (types.out or nothing, types.end, types.collected or nothing),
        grid=(values // plan.values * batch * heads, segments),
        num_warps=4,
        num_stages=plan.stages,
        STREAMS=batch * heads,
        HEADS=heads,
        CHUNKS=chunks,
        K=operands.b.shape[-1],
        V=values,
        BV=plan.values,
        SEGMENT=plan.segment,
        SEGMENTS=segments,
        C=CHUNK,
        EVERY=ANCHOR,
        REVERSE=kind.reverse,
        COLLECT=_COLLECT[kind.collect],
        OUTPUT=kind.output,
        PRECISION="ieee",
    )
    return Swept(swept if kind.output else None, end, collected if kind.collect else None)


def run(kinds: tuple[Kind, ...], operands: tuple[Operands, ...], gates: Gates, plan: Plan) -> tuple[Swept, ...]:
    """A backend of `sweep.Fused`: one launch a sweep."""
    return tuple(_sweep(kind, these, gates, plan) for kind, these in zip(kinds, operands, strict=True))


def _plan(batch: int, chunks: int, heads: int, keys: int, values: int, itemsize: int) -> Plan:
    block = min(values, 64 if itemsize == 2 else 32)
    stages = 1 if itemsize == 4 else 2 if keys <= 64 else 3
    return Plan(block, stages, segment_chunks(chunks, batch * heads * values // block))


FUSED = Fused(run, _plan)

"""The fused form as Triton kernels through jax-triton, for NVIDIA GPUs from sm_80, also in float32.

The tiles are those of `tiled.py`; Triton places them in registers and shared memory itself.
"""

# Triton and jax-triton come with the GPU extras; without them nothing here can be checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.hebbian import triton_gates, triton_segments
from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates, Paths
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
from pallas_kernels.hebbian.triton_cotangents import cotangents_kernel
from pallas_kernels.hebbian.triton_queries import queries_kernel
from pallas_kernels.hebbian.triton_sweep import sweep_kernel
from pallas_kernels.triton_call import launch


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
        sweep_kernel,
        (operands.a, operands.b, operands.c, gates.rows, operands.start),
        (types.out or nothing, types.end, types.states or nothing),
        grid=(values // plan.values * batch * heads, segments),
        num_warps=_warps(values),
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
    """The backward kernels of `sweep.Fused`; plan.values: columns of a program, keys of dq and dk, values of dv."""
    batch, heads, chunks, _ = gates.eta.shape
    width, segments = pulled.v.shape[-1], pulled.end.shape[2]
    blocks = width // plan.values
    types = cotangent_types(pulled, gates, blocks, blocks, 1)
    tiles = (pulled.q, pulled.k, pulled.v, pulled.dy, gates.rows, pulled.entries)
    shared = {"STREAMS": batch * heads, "WIDTH": width, "BLOCK": plan.values, **_constants(gates)}
    shared |= {"num_warps": _warps(width), "num_stages": plan.stages}
    dk, dv, start, stored, deta, anchors = launch(
        cotangents_kernel,
        (*tiles, pulled.end),
        (types.dk, types.dv, types.start, types.paths.stored, types.paths.deta, types.paths.anchors),
        grid=(2 * blocks * batch * heads, segments),
        SEGMENT=plan.segment,
        SEGMENTS=segments,
        **shared,
    )
    dq, read, inside = launch(
        queries_kernel,
        tiles,
        (types.dq, types.paths.read, types.paths.inside),
        grid=(blocks * batch * heads, -(-chunks // plan.split)),
        SPLIT=plan.split,
        **shared,
    )
    return Cotangents(dq, dk, dv, start, Paths(inside, read, stored, deta, anchors))


def _warps(width: int) -> int:
    return 8 if width > 128 else 4


def _stages(width: int, itemsize: int) -> int:
    """Loads in flight, as measured on an H200; a single one where their tiles leave no room."""
    return 1 if itemsize == 4 or width > 128 else 3


def _block(width: int, itemsize: int) -> int:
    """Columns of the state in a program that shares it with others."""
    return min(width, 64 if itemsize == 2 else 32)


def forward_plan(batch: int, chunks: int, heads: int, width: int, itemsize: int) -> Plan:
    block = _block(width, itemsize)
    return Plan(block, _stages(width, itemsize), segment_chunks(chunks, batch * heads * width // block))


def backward_plan(batch: int, chunks: int, heads: int, width: int, itemsize: int) -> Plan:
    block = _block(width, itemsize)
    stages = 2 if width == 128 else _stages(width, itemsize)
    # 16 chunks pay for the first loads of a program; fewer where that would not fill the device twice over.
    split = batch * heads * (width // block) * chunks // 512 // ANCHOR * ANCHOR
    programs = 2 * batch * heads * (width // block)
    return Plan(block, stages, segment_chunks(chunks, programs), min(max(split, ANCHOR), 16))


FUSED = Fused(
    forward,
    backward,
    forward_plan,
    backward_plan,
    widths=(32, 64, 128, 256),
    prepare=triton_gates.prepare,
    collect=triton_gates.collect,
    join=triton_segments.join,
)

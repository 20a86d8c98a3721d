"""The fused form as Pallas Mosaic GPU kernels, for NVIDIA GPUs from sm_90.

Programs carry their state in registers through their chunks. Tiles arrive by the tensor memory accelerator, some chunks
ahead; all products are wgmma with operands in shared memory, the masked scores in registers. Several programs share a
multiprocessor and hide each other's latencies.
"""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian import mosaic_ahead, mosaic_cotangents, mosaic_queries, mosaic_sweep
from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates, Paths
from pallas_kernels.hebbian.mosaic_ahead import Ahead
from pallas_kernels.hebbian.mosaic_cotangents import CarryBack
from pallas_kernels.hebbian.mosaic_queries import ReadAgain
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

# A device takes so many programs on any axis but the last.
_AXIS = 65_535
# Of an H200 and an H100.
_MULTIPROCESSORS = 132


def _launch(body: Callable[..., None], inputs: Any, types: Any, scratch: Any, axes: dict[str, int], **options: Any):
    """body(inputs, results, scratch), all of references; results like types. The last axis runs fastest."""
    arrays, inputs_tree = jax.tree.flatten(inputs)
    flat_types, types_tree = jax.tree.flatten(types)
    flat_scratch, scratch_tree = jax.tree.flatten(
        scratch, is_leaf=lambda x: hasattr(x, "shape") or isinstance(x, plgpu.Barrier)
    )

    def kernel(*refs):
        refs = iter(refs)
        given = inputs_tree.unflatten(itertools.islice(refs, len(arrays)))
        results = types_tree.unflatten(itertools.islice(refs, len(flat_types)))
        body(given, results, scratch_tree.unflatten(refs))

    found = plgpu.kernel(
        kernel,
        out_type=flat_types,
        scratch_types=flat_scratch,
        grid=tuple(axes.values()),
        grid_names=tuple(axes),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # Sums along rows stay inside a warp.
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # A barrier around every access cost 3 % more than the few that are needed (commit_smem is one).
            unsafe_no_auto_barriers=True,
        ),
        **options,
    )(*arrays)
    return types_tree.unflatten(found)


def forward(kind: Kind, operands: Operands, gates: Gates, plan: Plan) -> Swept:
    """A forward kernel of `sweep.Fused`; a kind with output runs in order of time."""
    batch, heads, chunks, _ = gates.eta.shape
    if not kind.output:
        operands = operands._replace(a=None)  # pyright: ignore[reportArgumentType]
    axes = {
        "block": operands.c.shape[-1] // plan.values,
        "stream": batch * heads,
        "segment": operands.start.shape[2],
    }
    order = ("block", "segment", "stream") if axes["block"] * axes["stream"] > _AXIS else tuple(axes)

    program, module = (Ahead, mosaic_ahead) if plan.ahead and kind.output else (mosaic_sweep.Program, mosaic_sweep)

    def body(inputs, results, scratch):
        program(kind, heads, chunks, plan, *inputs, results, scratch).run()

    scratch = module.scratch_types(kind, operands, plan)
    types = swept_types(kind, operands, gates)
    name = "hebbian_forward" if kind.output else "hebbian_carry"
    return _launch(body, (operands, gates), types, scratch, {axis: axes[axis] for axis in order}, kernel_name=name)


def backward(pulled: Pulled, gates: Gates, plan: Plan) -> Cotangents:
    """The backward kernels of `sweep.Fused`: first the walk of the cotangent, which ends where that of dq begins."""
    batch, heads, chunks, _ = gates.eta.shape
    panels, segments = pulled.v.shape[-1] // CHUNK, pulled.end.shape[2]
    types = cotangent_types(pulled, gates, panels, 1, panels)

    def launch(walk, module, warpgroups: int, axis: str, programs: int, types: Cotangents):
        def body(inputs, results, scratch):
            walk(heads, chunks, plan, warpgroups, *inputs, results, scratch).run()

        axes = {axis: programs, "stream": batch * heads}
        scratch = module.scratch_types(pulled, plan)
        options = {"num_threads": warpgroups, "thread_name": "part", "kernel_name": f"hebbian_{walk.__name__}"}
        return _launch(body, (pulled, gates), types, scratch, axes, **options)

    nothing, paths = cast(Any, None), types.paths
    carried = types._replace(dq=nothing, paths=paths._replace(read=nothing, inside=nothing))
    read = Cotangents(types.dq, *[nothing] * 3, Paths(paths.inside, paths.read, *[nothing] * 3))
    found = launch(CarryBack, mosaic_cotangents, 2, "segment", segments, carried)
    queries = launch(ReadAgain, mosaic_queries, panels, "split", -(-chunks // plan.split), read)
    paths = found.paths._replace(read=queries.paths.read, inside=queries.paths.inside)
    return found._replace(dq=queries.dq, paths=paths)


def forward_plan(batch: int, chunks: int, heads: int, width: int, itemsize: int) -> Plan:
    """As measured on an H200: more loads in flight pay where a program has a multiprocessor to itself.

    At width 128 it has: the loads of scores computed ahead leave no room for another, and are worth 4 %. At width 64
    that form took between 5 % less and 16 % more.
    """
    del itemsize
    programs = batch * heads * width // CHUNK
    segment = segment_chunks(chunks, programs)
    alone = programs * -(-chunks // segment) <= _MULTIPROCESSORS
    wide = width == 128
    return Plan(CHUNK, 4 if alone or wide else 2, segment, ahead=wide)


def backward_plan(batch: int, chunks: int, heads: int, width: int, itemsize: int) -> Plan:
    del itemsize
    # 16 chunks pay for the first loads of a program; fewer where that would not fill the device.
    split = next((n for n in (16, 8) if batch * heads * chunks >= n * 2 * _MULTIPROCESSORS), ANCHOR)
    # The walk of the cotangent has a multiprocessor to itself.
    segment = segment_chunks(chunks, batch * heads, enough=100, wanted=_MULTIPROCESSORS)
    return Plan(width, 2, segment, split, carry=(CHUNK, 6) if width == 128 else None)


FUSED = Fused(forward, backward, forward_plan, backward_plan, widths=(64, 128))

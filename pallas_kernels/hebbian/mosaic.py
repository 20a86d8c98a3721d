"""The sweeps of the fused form as a Pallas Mosaic GPU kernel, for NVIDIA GPUs from sm_90.

One warpgroup per program carries a K x (block of values) state in registers through its chunks. Tiles arrive by the
tensor memory accelerator, some chunks ahead; all products are wgmma with operands in shared memory, the masked scores
in registers. Several programs share a multiprocessor and hide each other's latencies.
"""

from __future__ import annotations

import itertools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import CHUNK, Gates
from pallas_kernels.hebbian.mosaic_sweep import Program, scratch_types, sizes_of
from pallas_kernels.hebbian.sweep import Fused, Kind, Operands, Plan, Swept, result_types, segment_chunks


def _launch(kinds: tuple[Kind, ...], operands: tuple[Operands, ...], gates: Gates, plan: Plan) -> tuple[Swept, ...]:
    """All sweeps side by side in one launch; their sizes have to be the same."""
    sizes = sizes_of(operands[0], gates)
    results = tuple(result_types(kind, these, gates, plan) for kind, these in zip(kinds, operands, strict=True))
    scratch = scratch_types(kinds, sizes, plan, operands[0].c.dtype)
    arrays, inputs_tree = jax.tree.flatten((operands, tuple(gates)))
    # An array that several sweeps read is passed once.
    distinct = list({id(array): array for array in arrays}.values())
    position = {id(array): n for n, array in enumerate(distinct)}
    flat_results, results_tree = jax.tree.flatten(results)
    flat_scratch, scratch_tree = jax.tree.flatten(
        scratch, is_leaf=lambda x: hasattr(x, "shape") or isinstance(x, plgpu.Barrier)
    )

    def kernel(*refs):
        refs = iter(refs)
        inputs = list(itertools.islice(refs, len(distinct)))
        outputs = results_tree.unflatten(itertools.islice(refs, len(flat_results)))
        shared = scratch_tree.unflatten(refs)
        all_operands, gate_refs = inputs_tree.unflatten(inputs[position[id(array)]] for array in arrays)
        for number, kind in enumerate(kinds):
            run = Program(kind, sizes, plan, all_operands[number], Gates(*gate_refs), outputs[number], shared).run
            if len(kinds) == 1:
                run()
            else:
                pl.when(lax.axis_index("sweep") == number)(run)

    axes = {
        "block": sizes.values // plan.values,
        "stream": sizes.batch * sizes.heads,
        "segment": operands[0].start.shape[2],
        "sweep": len(kinds),
    }
    # A device takes 65,535 programs on any axis but the last; all before the last two are one to it.
    many = axes["block"] * axes["stream"] > 65_535
    order = ("block", "segment", "sweep", "stream") if many else tuple(axes)
    found = plgpu.kernel(
        kernel,
        out_type=flat_results,
        scratch_types=flat_scratch,
        grid=tuple(axes[name] for name in order),
        grid_names=order,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # A barrier around every access cost 3 % more than the few that are needed (commit_smem is one).
            unsafe_no_auto_barriers=True,
        ),
    )(*distinct)
    return results_tree.unflatten(found)


def run(kinds: tuple[Kind, ...], operands: tuple[Operands, ...], gates: Gates, plan: Plan) -> tuple[Swept, ...]:
    """A backend of `sweep.Fused`: sweeps of one size go into one launch."""
    if len({sizes_of(these, gates) for these in operands}) == 1:
        return _launch(kinds, operands, gates, plan)
    return tuple(_launch((kind,), (these,), gates, plan)[0] for kind, these in zip(kinds, operands, strict=True))


def _plan(batch: int, chunks: int, heads: int, keys: int, values: int, itemsize: int) -> Plan:
    """As measured on an H200: a third load in flight pays where the tiles are wide."""
    del itemsize
    return Plan(CHUNK, 2 if keys <= 64 else 3, segment_chunks(chunks, batch * heads * values // CHUNK))


FUSED = Fused(run, _plan)

"""The sweeps of the fused form as a Pallas Mosaic GPU kernel, for NVIDIA GPUs from sm_90.

One warpgroup per program carries a K x (block of values) state in registers through its chunks. Tiles arrive by the
tensor memory accelerator, some chunks ahead; all products are wgmma with operands in shared memory, the masked scores in
registers. Several programs share a multiprocessor and hide each other's latencies.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.sweep import Kind, Operands, Plan, Swept

_MATRIX = plgpu.Layout.WGMMA


class _Sizes(NamedTuple):
    batch: int
    heads: int
    chunks: int
    keys: int
    values: int


class _Results(NamedTuple):
    out: Any
    end: Any
    collected: Any


class _Scratch(NamedTuple):
    """Shared memory of a program: tiles in flight, what the products need besides, and their barriers."""

    a: Any
    b: Any
    c: Any
    gates: Any
    x: Any
    state: Any
    weighted: Any
    pairs: Any
    arrived: Any
    x_arrived: Any


def _sizes(operands: Operands, gates: Gates) -> _Sizes:
    batch, heads, chunks, _ = gates.eta.shape
    return _Sizes(batch, heads, chunks, operands.b.shape[-1], operands.c.shape[-1])


def _tile_width(sizes: _Sizes, plan: Plan) -> int:
    """Columns of a swizzled tile; one width for all operands, as wgmma wants both of a product alike."""
    return min(sizes.keys, plan.values, 64)


def _scratch_types(kinds: Sequence[Kind], sizes: _Sizes, plan: Plan, dtype) -> _Scratch:
    width = _tile_width(sizes, plan)
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize))

    def tile(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    keys, values, stages = sizes.keys, plan.values, plan.stages
    outputs = any(kind.output for kind in kinds)
    has_x = any(kind.collect in ("paths", "rows") for kind in kinds)
    own_pairs = any(kind.collect == "paths" for kind in kinds) and (keys, values) != (CHUNK, CHUNK)
    return _Scratch(
        a=tile(stages, CHUNK, keys) if outputs else None,
        b=tile(stages, CHUNK, keys),
        c=tile(stages, CHUNK, values),
        gates=plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
        x=tile(CHUNK, values) if has_x else None,
        state=tile(keys, values) if outputs else None,
        weighted=tile(CHUNK, values),
        pairs=tile(CHUNK, CHUNK) if own_pairs else None,
        arrived=plgpu.Barrier(num_arrivals=6 if outputs else 5, num_barriers=stages),
        x_arrived=plgpu.Barrier(num_arrivals=1) if has_x else None,
    )


def shared_memory(kinds: Sequence[Kind], keys: int, plan: Plan, itemsize: int) -> int:
    """Bytes of shared memory of a program."""
    leaves = jax.tree.leaves(
        _scratch_types(kinds, _Sizes(1, 1, 1, keys, plan.values), plan, jnp.bfloat16),
        is_leaf=lambda x: hasattr(x, "shape"),
    )
    tiles = sum(
        functools.reduce(lambda n, size: n * size, leaf.shape, jnp.dtype(leaf.dtype).itemsize)
        for leaf in leaves
        if hasattr(leaf, "dtype") and not isinstance(leaf, plgpu.Barrier)
    )
    return tiles * itemsize // 2 + 1024


def _rows(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [0])


def _columns(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [1])


class _Decays(NamedTuple):
    """Factors of a chunk: per row what the entering state and a write into the leaving one are worth, and the whole."""

    entry: jax.Array
    leave: jax.Array
    eta: jax.Array
    whole: jax.Array


def _row_decays(gates_ref, reverse: bool) -> _Decays:
    high, low, eta = (plgpu.load(gates_ref.at[n], (), layout=_MATRIX.reduce(1)) for n in range(3))
    last_high, last_low = gates_ref[0, CHUNK - 1], gates_ref[1, CHUNK - 1]
    from_entry = jnp.exp2(high + low)
    to_exit = jnp.exp2((last_high - high) + (last_low - low))
    whole = jnp.exp2(last_high + last_low)
    if reverse:
        return _Decays(to_exit, from_entry, eta, whole)
    return _Decays(from_entry, to_exit * eta, eta, whole)


def _masked_scores(scores: jax.Array, gates_ref, reverse: bool) -> jax.Array:
    """Scores times the decays between their tokens (and eta of the written one), 0 where time would run backwards."""
    square = scores.shape
    parts = []
    for part in range(2):
        row = _rows(plgpu.load(gates_ref.at[part], (), layout=_MATRIX.reduce(1)), square)
        column = _columns(plgpu.load(gates_ref.at[part], (), layout=_MATRIX.reduce(0)), square)
        parts.append(column - row if reverse else row - column)
    scores = scores * jnp.exp2(parts[0] + parts[1])
    if not reverse:
        scores = scores * _columns(plgpu.load(gates_ref.at[2], (), layout=_MATRIX.reduce(0)), square)
    rows, columns = _positions()
    # Selected after exp2, which overflows on the other side of the diagonal: no gradient passes here.
    return jnp.where(columns >= rows if reverse else columns <= rows, scores, 0.0)


def _positions() -> tuple[jax.Array, jax.Array]:
    square = (CHUNK, CHUNK)
    return tuple(plgpu.broadcasted_iota(jnp.int32, square, axis, layout=_MATRIX) for axis in range(2))  # pyright: ignore[reportReturnType]


def _product(a, b, rows: int, columns: int) -> jax.Array:
    def compute(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(compute, plgpu.ACC((rows, columns), jnp.float32))


def _products(pairs, shapes) -> list[jax.Array]:
    """Several products in one batch of instructions."""

    def compute(*accs):
        for (a, b), acc in zip(pairs, accs, strict=True):
            plgpu.wgmma(acc, a, b)
        return [acc[...] for acc in accs]

    return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def _accumulate(pairs, starts) -> list[jax.Array]:
    """starts plus products, in one batch of instructions."""

    def compute(refs):
        for (a, b), acc in zip(pairs, refs, strict=True):
            plgpu.wgmma(acc, a, b)

    return pl.run_state(compute)([plgpu.ACC.init(start) for start in starts])


def _program(kind: Kind, sizes: _Sizes, plan: Plan, operands: Operands, gates, results: _Results, scratch: _Scratch):
    """One sweep over the chunks of one segment, for one head of one batch row and one block of values."""
    head_index = lax.axis_index("stream")
    batch, head = lax.div(head_index, jnp.int32(sizes.heads)), lax.rem(head_index, jnp.int32(sizes.heads))
    block, segment = lax.axis_index("block"), lax.axis_index("segment")
    columns = pl.ds(block * plan.values, plan.values)
    first = segment * plan.segment
    steps = jnp.minimum(plan.segment, sizes.chunks - first)
    has_x = kind.collect in ("paths", "rows")
    sums, eta = gates

    def chunk_of(step):
        return first + (steps - 1 - step if kind.reverse else step)

    def fetch(step):
        slot, chunk = lax.rem(step, jnp.int32(plan.stages)), chunk_of(step)
        tokens, barrier = pl.ds(chunk * CHUNK, CHUNK), scratch.arrived.at[slot]
        if kind.output:
            plgpu.copy_gmem_to_smem(operands.a.at[batch, tokens, head], scratch.a.at[slot], barrier)
        plgpu.copy_gmem_to_smem(operands.b.at[batch, tokens, head], scratch.b.at[slot], barrier)
        plgpu.copy_gmem_to_smem(operands.c.at[batch, tokens, head, columns], scratch.c.at[slot], barrier)
        for part in range(2):
            plgpu.copy_gmem_to_smem(sums.at[part, batch, head, chunk], scratch.gates.at[slot, part], barrier)
        plgpu.copy_gmem_to_smem(eta.at[batch, head, chunk], scratch.gates.at[slot, 2], barrier)

    def fetch_x(step):
        tokens = pl.ds(chunk_of(step) * CHUNK, CHUNK)
        plgpu.copy_gmem_to_smem(operands.x.at[batch, tokens, head, columns], scratch.x, scratch.x_arrived)

    for step in range(plan.stages):
        pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))
    if has_x:
        fetch_x(jnp.int32(0))
    tile = (CHUNK, plan.values)

    def read_out(state, decays: _Decays, slot, chunk):
        """Writes out of a chunk and what is collected on the way; the state after it."""
        a, b, c = (ref.at[slot] for ref in (scratch.a, scratch.b, scratch.c))
        scores, from_state = _products(
            [(a, b.T), (a, scratch.state)], [(CHUNK, CHUNK), tile]
        )
        scores = _masked_scores(scores, scratch.gates.at[slot], kind.reverse)
        from_state = from_state * _rows(decays.entry, tile)
        if has_x:
            plgpu.barrier_wait(scratch.x_arrived)
            x = plgpu.load(scratch.x, (), layout=_MATRIX).astype(jnp.float32)
            results.collected.at[1 if kind.collect == "paths" else 0, block, batch, head, chunk][...] = jnp.sum(
                x * from_state, axis=1
            ) * (decays.eta if kind.collect == "rows" else 1.0)
        if kind.collect == "paths":
            pairs = scores * _product(scratch.x, c.T, CHUNK, CHUNK)
            pairs_ref = scratch.state if scratch.pairs is None else scratch.pairs
            pairs_ref[...] = pairs.astype(pairs_ref.dtype)
            plgpu.commit_smem()
            rows, cols = _positions()
            at_or_after = jnp.where(cols >= rows, 1.0, 0.0).astype(pairs_ref.dtype)
            later = _product(at_or_after, pairs_ref, CHUNK, CHUNK)
            results.collected.at[0, block, batch, head, chunk][...] = jnp.sum(
                jnp.where(cols < rows, later, 0.0), axis=1
            )
        out, state = _accumulate(
            [(scores.astype(a.dtype), c), (b.T, scratch.weighted)], [from_state, state * decays.whole]
        )
        if kind.collect == "rows":
            results.collected.at[1, block, batch, head, chunk][...] = jnp.sum(
                plgpu.load(scratch.x, (), layout=_MATRIX).astype(jnp.float32) * out, axis=1
            )
        if kind.reverse:
            out = out * _rows(decays.eta, tile)
        # Shares the memory of the weighted values, which no product needs any more.
        scratch.weighted[...] = out.astype(scratch.weighted.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            scratch.weighted, results.out.at[batch, pl.ds(chunk * CHUNK, CHUNK), head, columns]
        )
        return state

    def body(step, state):
        slot, chunk = lax.rem(step, jnp.int32(plan.stages)), chunk_of(step)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        decays = _row_decays(scratch.gates.at[slot], kind.reverse)
        if kind.output:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.state[...] = state.astype(scratch.state.dtype)
        values = plgpu.load(scratch.c.at[slot], (), layout=_MATRIX).astype(jnp.float32)
        scratch.weighted[...] = (values * _rows(decays.leave, tile)).astype(scratch.weighted.dtype)
        plgpu.commit_smem()
        if kind.collect == "states":

            @pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)
            def _():
                anchor = lax.div(chunk, jnp.int32(ANCHOR))
                plgpu.copy_smem_to_gmem(scratch.state, results.collected.at[batch, head, anchor, :, columns])

        if kind.output:
            state = read_out(state, decays, slot, chunk)
        else:
            (state,) = _accumulate([(scratch.b.at[slot].T, scratch.weighted)], [state * decays.whole])
        if kind.collect == "anchors":

            @pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)
            def _():
                anchor = lax.div(chunk, jnp.int32(ANCHOR))
                stored = plgpu.load(
                    operands.x.at[batch, head, anchor, :, columns], (), layout=_MATRIX, optimized=False
                ).astype(jnp.float32)
                results.collected.at[block, batch, head, anchor][...] = jnp.sum(stored * state, axis=1)

        pl.when(step + plan.stages < steps)(functools.partial(fetch, step + plan.stages))
        if has_x:
            pl.when(step + 1 < steps)(functools.partial(fetch_x, step + 1))
        return state

    start = plgpu.load(operands.start.at[batch, head, segment, :, columns], (), layout=_MATRIX, optimized=False)
    state = lax.fori_loop(0, steps, body, start)
    results.end.at[batch, head, segment, :, columns][...] = state
    plgpu.wait_smem_to_gmem(0)


def _result_types(kind: Kind, operands: Operands, sizes: _Sizes, plan: Plan) -> _Results:
    batch, heads, chunks, keys, values = sizes
    blocks, anchors = values // plan.values, -(-chunks // ANCHOR)
    single = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    collected = {
        "": None,
        "states": jax.ShapeDtypeStruct((batch, heads, anchors, keys, values), operands.c.dtype),
        "paths": single((2, blocks, batch, heads, chunks, CHUNK)),
        "rows": single((2, blocks, batch, heads, chunks, CHUNK)),
        "anchors": single((blocks, batch, heads, anchors, keys)),
    }[kind.collect]
    out = jax.ShapeDtypeStruct(operands.c.shape, operands.c.dtype) if kind.output else None
    return _Results(out, single(operands.start.shape), collected)


def _launch(kinds: tuple[Kind, ...], operands: tuple[Operands, ...], gates: Gates, plan: Plan) -> tuple[_Results, ...]:
    """All sweeps side by side in one launch; their sizes have to be the same."""
    sizes = _sizes(operands[0], gates)
    results = tuple(_result_types(kind, these, sizes, plan) for kind, these in zip(kinds, operands, strict=True))
    scratch = _scratch_types(kinds, sizes, plan, operands[0].c.dtype)
    arrays, inputs_tree = jax.tree.flatten((operands, tuple(gates)))
    # An array that several sweeps read is passed once.
    distinct = list({id(array): array for array in arrays}.values())
    position = {id(array): n for n, array in enumerate(distinct)}
    flat_results, results_tree = jax.tree.flatten(results)
    flat_scratch, scratch_tree = jax.tree.flatten(scratch, is_leaf=lambda x: hasattr(x, "shape") or isinstance(x, plgpu.Barrier))

    def kernel(*refs):
        refs = iter(refs)
        inputs = list(itertools.islice(refs, len(distinct)))
        outputs = results_tree.unflatten(itertools.islice(refs, len(flat_results)))
        shared = scratch_tree.unflatten(refs)
        all_operands, gate_refs = inputs_tree.unflatten(inputs[position[id(array)]] for array in arrays)
        for number, kind in enumerate(kinds):
            run = functools.partial(
                _program, kind, sizes, plan, all_operands[number], gate_refs, outputs[number], shared
            )
            if len(kinds) == 1:
                run()
            else:
                pl.when(lax.axis_index("sweep") == number)(run)

    segments = operands[0].start.shape[2]
    found = plgpu.kernel(
        kernel,
        out_type=flat_results,
        scratch_types=flat_scratch,
        grid=(sizes.values // plan.values, sizes.batch * sizes.heads, segments, len(kinds)),
        grid_names=("block", "stream", "segment", "sweep"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*distinct)
    return results_tree.unflatten(found)


def run(kinds: tuple[Kind, ...], operands: tuple[Operands, ...], gates: Gates, plan: Plan) -> tuple[Swept, ...]:
    """A backend of `sweep.Fused`: sweeps of one size go into one launch."""
    together = len({_sizes(these, gates) for these in operands}) == 1
    groups = [range(len(kinds))] if together else [[n] for n in range(len(kinds))]
    found: list[Swept] = []
    for group in groups:
        these = tuple(operands[n] for n in group)
        for n, result in zip(group, _launch(tuple(kinds[n] for n in group), these, gates, plan), strict=True):
            collected = jnp.sum(result.collected, axis=-1) if kinds[n].collect == "anchors" else result.collected
            found.append(Swept(result.out, result.end, collected))
    return tuple(found)

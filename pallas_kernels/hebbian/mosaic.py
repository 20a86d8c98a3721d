"""The sweeps of the fused form as a Pallas Mosaic GPU kernel, for NVIDIA GPUs from sm_90.

One warpgroup per program carries a K x (block of values) state in registers through its chunks. Tiles arrive by the
tensor memory accelerator, some chunks ahead; all products are wgmma with operands in shared memory, the masked scores
in registers. Several programs share a multiprocessor and hide each other's latencies.
"""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false

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
from pallas_kernels.hebbian.sweep import Fused, Kind, Operands, Plan, Swept

_MATRIX = plgpu.Layout.WGMMA
_OWN_BARRIERS = True


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
    x_rows = max({"paths": CHUNK, "rows": CHUNK, "anchors": keys}.get(kind.collect, 0) for kind in kinds)
    own_pairs = any(kind.collect == "paths" for kind in kinds) and (keys, values) != (CHUNK, CHUNK)
    return _Scratch(
        a=tile(stages, CHUNK, keys) if outputs else None,
        b=tile(stages, CHUNK, keys),
        c=tile(stages, CHUNK, values),
        gates=plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
        x=tile(x_rows, values) if x_rows else None,
        state=tile(keys, values) if outputs else None,
        weighted=tile(CHUNK, values),
        pairs=tile(CHUNK, CHUNK) if own_pairs else None,
        arrived=plgpu.Barrier(num_arrivals=5 if outputs else 4, num_barriers=stages),
        x_arrived=plgpu.Barrier(num_arrivals=1) if x_rows else None,
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


# Decays inside a chunk down to 2**-100 leave their inverses, and products with them, inside the floats.
_RANGE = 100.0


class _Decays(NamedTuple):
    """Factors of a chunk, per row: row what the entering state is worth in the readout, weight that of the values.

    Where the whole decay is within _RANGE (inside), D_ij = row_i / row_j, weight is 1 / row (in order of time, times
    eta)
    and decays need no C x C arithmetic: out_i = row_i (sum_j mask_ij (a_i . b_j) weight_j c_j + a_i S), and the next
    state is whole (S + sum_j weight_j b_j c_j^T). Elsewhere weight is what a write is worth in the leaving state.
    """

    row: jax.Array
    weight: jax.Array
    eta: jax.Array
    whole: jax.Array
    inside: jax.Array


def _decays(gates_ref, reverse: bool) -> _Decays:
    high, low, eta = (plgpu.load(gates_ref.at[n], (), layout=_MATRIX.reduce(1)) for n in range(3))
    last_high, last_low = gates_ref[0, CHUNK - 1], gates_ref[1, CHUNK - 1]
    total = last_high + last_low
    inside = total > -_RANGE
    shift = jnp.where(inside, total, 0.0)
    from_entry, to_exit = high + low, (last_high - high) + (last_low - low)
    if reverse:
        return _Decays(jnp.exp2(to_exit), jnp.exp2(from_entry - shift), eta, jnp.exp2(total), inside)
    return _Decays(jnp.exp2(from_entry), jnp.exp2(to_exit - shift) * eta, eta, jnp.exp2(total), inside)


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
    # Masked after exp2, which overflows on the other side of the diagonal: no gradient passes here.
    return _masked(scores, reverse)


def _masked(scores: jax.Array, reverse: bool) -> jax.Array:
    rows, columns = _positions()
    return jnp.where(columns >= rows if reverse else columns <= rows, scores, 0.0)


def _positions() -> tuple[jax.Array, jax.Array]:
    square = (CHUNK, CHUNK)
    return tuple(plgpu.broadcasted_iota(jnp.int32, square, axis, layout=_MATRIX) for axis in range(2))  # pyright: ignore[reportReturnType]


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
    x_rows = sizes.keys if kind.collect == "anchors" else CHUNK
    x_tile = scratch.x if scratch.x is None or scratch.x.shape[0] == x_rows else scratch.x.at[pl.ds(0, x_rows)]
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
        plgpu.copy_gmem_to_smem(sums.at[batch, head, chunk], scratch.gates.at[slot, pl.ds(0, 2)], barrier)
        plgpu.copy_gmem_to_smem(eta.at[batch, head, chunk], scratch.gates.at[slot, 2], barrier)

    def fetch_x(step):
        chunk = chunk_of(step)
        if has_x:
            source = operands.x.at[batch, pl.ds(chunk * CHUNK, CHUNK), head, columns]
            plgpu.copy_gmem_to_smem(source, x_tile, scratch.x_arrived)
        elif kind.collect == "anchors":

            @pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)
            def _():
                source = operands.x.at[batch, head, lax.div(chunk, jnp.int32(ANCHOR)), :, columns]
                plgpu.copy_gmem_to_smem(source, x_tile, scratch.x_arrived)

    for step in range(plan.stages):
        pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))
    fetch_x(jnp.int32(0))
    tile = (CHUNK, plan.values)

    def products(state, decays: _Decays, slot, chunk, inside: bool):
        """Readout of a chunk, before eta scales it, and the state after it; collects on the way."""
        a, b, c = (ref.at[slot] for ref in (scratch.a, scratch.b, scratch.c))
        values = scratch.weighted if inside else c
        first_pairs = [(a, b.T), (a, scratch.state)]
        first_shapes = [(CHUNK, CHUNK), tile]
        if kind.collect == "paths":
            first_pairs.append((x_tile, values.T))
            first_shapes.append((CHUNK, CHUNK))
        scores, from_state, *along = _products(first_pairs, first_shapes)
        if inside:
            scores = _masked(scores, kind.reverse)
        else:
            scores = _masked_scores(scores, scratch.gates.at[slot], kind.reverse)
            from_state = from_state * _rows(decays.row, tile)
            state = state * decays.whole
        scale = decays.row if inside else jnp.ones_like(decays.row)
        vectors = [None, None]
        if has_x:
            x = plgpu.load(x_tile, (), layout=_MATRIX).astype(jnp.float32)
            vectors[0] = jnp.sum(x * from_state, axis=1) * scale
        second_pairs, starts = [(scores.astype(a.dtype), values), (b.T, scratch.weighted)], [from_state, state]
        if kind.collect == "paths":
            rows, cols = _positions()
            pairs = scores * along[0]
            if inside:
                pairs = pairs * _rows(decays.row, (CHUNK, CHUNK))
            pairs_ref = scratch.state if scratch.pairs is None else scratch.pairs
            plgpu.commit_smem()
            pairs_ref[...] = pairs.astype(pairs_ref.dtype)
            plgpu.commit_smem()
            second_pairs.append((jnp.where(cols >= rows, 1.0, 0.0).astype(pairs_ref.dtype), pairs_ref))
            starts.append(plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), _MATRIX))
        out, state, *later = _accumulate(second_pairs, starts)
        if inside:
            out, state = out * _rows(decays.row, tile), state * decays.whole
        if kind.collect == "paths":
            vectors = [jnp.sum(jnp.where(cols < rows, later[0], 0.0), axis=1), vectors[0]]
        elif kind.collect == "rows":
            x = plgpu.load(x_tile, (), layout=_MATRIX).astype(jnp.float32)
            vectors = [vectors[0] * decays.eta, jnp.sum(x * out, axis=1)]
        for part, vector in enumerate(vectors):
            if vector is not None:
                results.collected.at[part, block, batch, head, chunk][...] = vector
        return out, state

    def read_out(state, decays: _Decays, slot, chunk):
        """Writes out of a chunk; the state after it."""
        if has_x:
            plgpu.barrier_wait(scratch.x_arrived)
        out, state = lax.cond(
            decays.inside,
            lambda state: products(state, decays, slot, chunk, inside=True),
            lambda state: products(state, decays, slot, chunk, inside=False),
            state,
        )
        if kind.reverse:
            out = out * _rows(decays.eta, tile)
        # Shares the memory of the weighted values, once no warp's product needs them any more.
        plgpu.commit_smem()
        scratch.weighted[...] = out.astype(scratch.weighted.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.weighted, results.out.at[batch, pl.ds(chunk * CHUNK, CHUNK), head, columns])
        return state

    def body(step, state):
        slot, chunk = lax.rem(step, jnp.int32(plan.stages)), chunk_of(step)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        decays = _decays(scratch.gates.at[slot], kind.reverse)
        if kind.output:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.state[...] = state.astype(scratch.state.dtype)
        values = plgpu.load(scratch.c.at[slot], (), layout=_MATRIX).astype(jnp.float32)
        scratch.weighted[...] = (values * _rows(decays.weight, tile)).astype(scratch.weighted.dtype)
        plgpu.commit_smem()
        if kind.collect == "states":

            @pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)
            def _():
                anchor = lax.div(chunk, jnp.int32(ANCHOR))
                plgpu.copy_smem_to_gmem(scratch.state, results.collected.at[batch, head, anchor, :, columns])

        if kind.output:
            state = read_out(state, decays, slot, chunk)
        else:
            # whole (state + written) inside the range, whole state + written elsewhere.
            before = jnp.where(decays.inside, 1.0, decays.whole)
            (state,) = _accumulate([(scratch.b.at[slot].T, scratch.weighted)], [state * before])
            state = state * jnp.where(decays.inside, decays.whole, 1.0)
            plgpu.commit_smem()
        if kind.collect == "anchors":

            @pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)
            def _():
                plgpu.barrier_wait(scratch.x_arrived)
                stored = plgpu.load(x_tile, (), layout=_MATRIX).astype(jnp.float32)
                anchor = lax.div(chunk, jnp.int32(ANCHOR))
                results.collected.at[block, batch, head, anchor][...] = jnp.sum(stored * state, axis=1)

        pl.when(step + plan.stages < steps)(functools.partial(fetch, step + plan.stages))
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
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=_OWN_BARRIERS,
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


def _plan(batch: int, chunks: int, heads: int, keys: int, values: int, itemsize: int) -> Plan:
    """Measured on an H200: one segment where the streams fill the device, else segments for some 256 programs."""
    del keys, itemsize
    streams = batch * heads * (values // CHUNK)
    if streams >= 64:
        return Plan(CHUNK, 2, chunks)
    segments = min(max(1, 256 // streams), -(-chunks // ANCHOR))
    length = -(-chunks // segments)
    return Plan(CHUNK, 2, min(chunks, -(-length // ANCHOR) * ANCHOR))


FUSED = Fused(run, _plan, lambda width: width)

"""One program of the Mosaic GPU sweep: the chunks of a segment, one after the other."""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.mosaic_tiles import (
    MATRIX,
    Decays,
    accumulate,
    decayed_scores,
    decays,
    load,
    masked,
    positions,
    products,
    rows,
)
from pallas_kernels.hebbian.sweep import Kind, Operands, Plan, Swept

_SQUARE = (CHUNK, CHUNK)


class Sizes(NamedTuple):
    batch: int
    heads: int
    chunks: int
    keys: int
    values: int


class Scratch(NamedTuple):
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


def sizes_of(operands: Operands, gates: Gates) -> Sizes:
    batch, heads, chunks, _ = gates.eta.shape
    return Sizes(batch, heads, chunks, operands.b.shape[-1], operands.c.shape[-1])


def scratch_types(kinds: Sequence[Kind], sizes: Sizes, plan: Plan, dtype) -> Scratch:
    """Enough for any of kinds, with tiles of dtype."""
    keys, values, stages = sizes.keys, plan.values, plan.stages
    # Columns of a swizzled tile: one width for all operands, as wgmma wants both of a product alike.
    width = min(keys, values, 64)
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize))

    def tile(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    outputs = any(kind.output for kind in kinds)
    x_rows = max({"paths": CHUNK, "rows": CHUNK, "anchors": keys}.get(kind.collect, 0) for kind in kinds)
    own_pairs = any(kind.collect == "paths" for kind in kinds) and (keys, values) != _SQUARE
    return Scratch(
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


@dataclasses.dataclass
class Program:
    """One sweep over the chunks of one segment, for one head of one batch row and one block of values.

    operands, gates, results: references to the arrays of the whole launch; scratch: its own shared memory.
    """

    kind: Kind
    sizes: Sizes
    plan: Plan
    operands: Operands
    gates: Gates
    results: Swept
    scratch: Scratch

    def __post_init__(self):
        stream = lax.axis_index("stream")
        heads = jnp.int32(self.sizes.heads)
        self.batch, self.head = lax.div(stream, heads), lax.rem(stream, heads)
        self.block, self.segment = lax.axis_index("block"), lax.axis_index("segment")
        self.columns = pl.ds(self.block * self.plan.values, self.plan.values)
        self.first = self.segment * self.plan.segment
        self.steps = jnp.minimum(self.plan.segment, self.sizes.chunks - self.first)
        self.tile = (CHUNK, self.plan.values)
        self.has_x = self.kind.collect in ("paths", "rows")
        x, x_rows = self.scratch.x, self.sizes.keys if self.kind.collect == "anchors" else CHUNK
        self.x = x if x is None or x.shape[0] == x_rows else x.at[pl.ds(0, x_rows)]

    def run(self) -> None:
        """The whole sweep."""
        operands, results = self.operands, self.results
        for step in range(self.plan.stages):
            pl.when(step < self.steps)(functools.partial(self._fetch, jnp.int32(step)))
        self._fetch_x(jnp.int32(0))
        start = operands.start.at[self.batch, self.head, self.segment, :, self.columns]
        state = lax.fori_loop(0, self.steps, self._step, load(start, MATRIX, optimized=False))
        results.end.at[self.batch, self.head, self.segment, :, self.columns][...] = state
        plgpu.wait_smem_to_gmem(0)

    def _chunk(self, step):
        return self.first + (self.steps - 1 - step if self.kind.reverse else step)

    def _at_anchor(self, chunk, do) -> None:
        """do(anchor) where chunk is the first of a block of ANCHOR."""
        pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)(lambda: do(lax.div(chunk, jnp.int32(ANCHOR))))

    def _tokens(self, ref, chunk, *columns):
        return ref.at[self.batch, pl.ds(chunk * CHUNK, CHUNK), self.head, *columns]

    def _fetch(self, step) -> None:
        slot, chunk = lax.rem(step, jnp.int32(self.plan.stages)), self._chunk(step)
        operands, scratch, barrier = self.operands, self.scratch, self.scratch.arrived.at[slot]
        if self.kind.output:
            plgpu.copy_gmem_to_smem(self._tokens(operands.a, chunk), scratch.a.at[slot], barrier)
        plgpu.copy_gmem_to_smem(self._tokens(operands.b, chunk), scratch.b.at[slot], barrier)
        plgpu.copy_gmem_to_smem(self._tokens(operands.c, chunk, self.columns), scratch.c.at[slot], barrier)
        sums, eta = (ref.at[self.batch, self.head, chunk] for ref in self.gates)
        plgpu.copy_gmem_to_smem(sums, scratch.gates.at[slot, pl.ds(0, 2)], barrier)
        plgpu.copy_gmem_to_smem(eta, scratch.gates.at[slot, 2], barrier)

    def _fetch_x(self, step) -> None:
        chunk = self._chunk(step)

        def fetch_state(anchor):
            source = self.operands.x.at[self.batch, self.head, anchor, :, self.columns]
            plgpu.copy_gmem_to_smem(source, self.x, self.scratch.x_arrived)

        if self.has_x:
            source = self._tokens(self.operands.x, chunk, self.columns)
            plgpu.copy_gmem_to_smem(source, self.x, self.scratch.x_arrived)
        elif self.kind.collect == "anchors":
            self._at_anchor(chunk, fetch_state)

    def _load_x(self) -> jax.Array:
        return load(self.x, MATRIX).astype(jnp.float32)

    def _step(self, step, state):
        """One chunk: the state after it."""
        kind, scratch = self.kind, self.scratch
        slot, chunk = lax.rem(step, jnp.int32(self.plan.stages)), self._chunk(step)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        factors = decays(scratch.gates.at[slot], kind.reverse)
        if kind.output:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.state[...] = state.astype(scratch.state.dtype)
        values = load(scratch.c.at[slot], MATRIX).astype(jnp.float32)
        scratch.weighted[...] = (values * rows(factors.weight, self.tile)).astype(scratch.weighted.dtype)
        plgpu.commit_smem()
        if kind.collect == "states":
            stored = self.results.collected.at[self.batch, self.head]
            self._at_anchor(
                chunk, lambda anchor: plgpu.copy_smem_to_gmem(scratch.state, stored.at[anchor, :, self.columns])
            )
        state = self._read_out(state, factors, slot, chunk) if kind.output else self._write(state, factors, slot)
        if kind.collect == "anchors":
            self._at_anchor(chunk, functools.partial(self._collect_anchor, state))
        pl.when(step + self.plan.stages < self.steps)(functools.partial(self._fetch, step + self.plan.stages))
        pl.when(step + 1 < self.steps)(functools.partial(self._fetch_x, step + 1))
        return state

    def _write(self, state, factors: Decays, slot):
        """The state after a chunk that nothing is read from."""
        # whole (state + written) inside the range, whole state + written elsewhere.
        before = jnp.where(factors.inside, 1.0, factors.whole)
        (state,) = accumulate([(self.scratch.b.at[slot].T, self.scratch.weighted)], [state * before])
        state = state * jnp.where(factors.inside, factors.whole, 1.0)
        plgpu.commit_smem()
        return state

    def _collect_anchor(self, state, anchor) -> None:
        plgpu.barrier_wait(self.scratch.x_arrived)
        place = self.results.collected.at[self.block, self.batch, self.head, anchor]
        place[...] = jnp.sum(self._load_x() * state, axis=1)

    def _read_out(self, state, factors: Decays, slot, chunk):
        """Writes out of a chunk; the state after it."""
        if self.has_x:
            plgpu.barrier_wait(self.scratch.x_arrived)
        out, state = lax.cond(
            factors.inside,
            lambda state: self._products(state, factors, slot, chunk, inside=True),
            lambda state: self._products(state, factors, slot, chunk, inside=False),
            state,
        )
        if self.kind.reverse:
            out = out * rows(factors.eta, self.tile)
        # Shares the memory of the weighted values, once no warp's product needs them any more.
        plgpu.commit_smem()
        weighted = self.scratch.weighted
        weighted[...] = out.astype(weighted.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weighted, self._tokens(self.results.out, chunk, self.columns))
        return state

    def _products(self, state, factors: Decays, slot, chunk, inside: bool):
        """Readout of a chunk, before eta scales it, and the state after it; collects on the way."""
        kind, scratch = self.kind, self.scratch
        a, b, c = (ref.at[slot] for ref in (scratch.a, scratch.b, scratch.c))
        values = scratch.weighted if inside else c
        operands, shapes = [(a, b.T), (a, scratch.state)], [_SQUARE, self.tile]
        if kind.collect == "paths":
            operands.append((self.x, values.T))
            shapes.append(_SQUARE)
        scores, from_state, *along = products(operands, shapes)
        if inside:
            scores = masked(scores, kind.reverse)
        else:
            scores = decayed_scores(scores, scratch.gates.at[slot], kind.reverse)
            from_state = from_state * rows(factors.row, self.tile)
            state = state * factors.whole
        read = self._read_of_state(from_state, factors, inside) if self.has_x else None
        operands, starts = [(scores.astype(a.dtype), values), (b.T, scratch.weighted)], [from_state, state]
        if kind.collect == "paths":
            operands.append(self._later_sums(scores * along[0], factors, inside))
            starts.append(plgpu.layout_cast(jnp.zeros(_SQUARE, jnp.float32), MATRIX))
        out, state, *later = accumulate(operands, starts)
        if inside:
            out, state = out * rows(factors.row, self.tile), state * factors.whole
        if kind.collect == "paths":
            row, column = positions()
            self._collect(chunk, jnp.sum(jnp.where(column < row, later[0], 0.0), axis=1), read)
        elif kind.collect == "rows":
            self._collect(chunk, read * factors.eta, jnp.sum(self._load_x() * out, axis=1))
        return out, state

    def _read_of_state(self, from_state, factors: Decays, inside: bool) -> jax.Array:
        read = jnp.sum(self._load_x() * from_state, axis=1)
        return read * factors.row if inside else read

    def _later_sums(self, pairs, factors: Decays, inside: bool):
        """Operands of the product that sums the paths of every written token over the readouts at t and after."""
        scratch = self.scratch
        if inside:
            pairs = pairs * rows(factors.row, _SQUARE)
        kept = scratch.state if scratch.pairs is None else scratch.pairs
        plgpu.commit_smem()
        kept[...] = pairs.astype(kept.dtype)
        plgpu.commit_smem()
        row, column = positions()
        return jnp.where(column >= row, 1.0, 0.0).astype(kept.dtype), kept

    def _collect(self, chunk, *vectors) -> None:
        for part, vector in enumerate(vectors):
            self.results.collected.at[part, self.block, self.batch, self.head, chunk][...] = vector

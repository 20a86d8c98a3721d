"""One program of the Mosaic GPU forward: the chunks of a segment, one after the other."""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.mosaic_tiles import (
    MATRIX,
    SQUARE,
    Decays,
    accumulate,
    decayed_scores,
    decays,
    load,
    masked,
    products,
    rows,
    tile_transforms,
)
from pallas_kernels.hebbian.sweep import Kind, Operands, Plan, Swept


class Scratch(NamedTuple):
    """Shared memory of a program: tiles in flight, what the products need besides, and their barriers."""

    a: Any
    b: Any
    c: Any
    gates: Any
    state: Any
    weighted: Any
    arrived: Any


def scratch_types(kind: Kind, operands: Operands, plan: Plan) -> Scratch:
    dtype, keys, values, stages = operands.c.dtype, operands.b.shape[-1], plan.values, plan.stages
    transforms = tile_transforms(min(keys, values, CHUNK), dtype)

    def tile(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return Scratch(
        a=tile(stages, CHUNK, keys) if kind.output else None,
        b=tile(stages, CHUNK, keys),
        c=tile(stages, CHUNK, values),
        gates=plgpu.SMEM((stages, 3, CHUNK), jnp.float32),
        state=tile(keys, values) if kind.output else None,
        weighted=tile(CHUNK, values),
        arrived=plgpu.Barrier(num_arrivals=4 if kind.output else 3, num_barriers=stages),
    )


@dataclasses.dataclass
class Program:
    """One walk over the chunks of one segment, for one head of one batch row and one block of values.

    operands, gates, results: references to the arrays of the whole launch; scratch: its own shared memory.
    """

    kind: Kind
    heads: int
    chunks: int
    plan: Plan
    operands: Operands
    gates: Gates
    results: Swept
    scratch: Scratch

    def __post_init__(self):
        stream, heads = lax.axis_index("stream"), jnp.int32(self.heads)
        self.batch, self.head = lax.div(stream, heads), lax.rem(stream, heads)
        self.segment = lax.axis_index("segment")
        self.columns = pl.ds(lax.axis_index("block") * self.plan.values, self.plan.values)
        self.first = self.segment * self.plan.segment
        self.steps = jnp.minimum(self.plan.segment, self.chunks - self.first)
        if not self.kind.output:
            # Nothing follows the last segment.
            last = 0 if self.kind.reverse else -(-self.chunks // self.plan.segment) - 1
            self.steps = jnp.where(self.segment == last, 0, self.steps)
        self.tile = (CHUNK, self.plan.values)

    def run(self) -> None:
        """The whole walk."""
        for step in range(self.plan.stages):
            pl.when(step < self.steps)(functools.partial(self._fetch, jnp.int32(step)))
        start = load(self._state_of(self.operands.start), MATRIX, optimized=False)
        state = lax.fori_loop(0, self.steps, self._step, start)
        self._state_of(self.results.end)[...] = state
        plgpu.wait_smem_to_gmem(0)

    def _state_of(self, ref):
        return ref.at[self.batch, self.head, self.segment, :, self.columns]

    def _slot(self, step):
        return lax.rem(step, jnp.int32(self.plan.stages))

    def _chunk(self, step):
        return self.first + (self.steps - 1 - step if self.kind.reverse else step)

    def _tokens(self, ref, chunk, *columns):
        return ref.at[self.batch, pl.ds(chunk * CHUNK, CHUNK), self.head, *columns]

    def _fetch(self, step) -> None:
        slot, chunk = self._slot(step), self._chunk(step)
        operands, scratch, barrier = self.operands, self.scratch, self.scratch.arrived.at[slot]
        if self.kind.output:
            plgpu.copy_gmem_to_smem(self._tokens(operands.a, chunk), scratch.a.at[slot], barrier)
        plgpu.copy_gmem_to_smem(self._tokens(operands.b, chunk), scratch.b.at[slot], barrier)
        plgpu.copy_gmem_to_smem(self._tokens(operands.c, chunk, self.columns), scratch.c.at[slot], barrier)
        plgpu.copy_gmem_to_smem(self.gates.rows.at[self.batch, self.head, chunk], scratch.gates.at[slot], barrier)

    def _step(self, step, state):
        """One chunk: the state after it."""
        kind, scratch = self.kind, self.scratch
        slot, chunk = self._slot(step), self._chunk(step)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        factors = decays(scratch.gates.at[slot], kind.reverse)
        if kind.output:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch.state[...] = state.astype(scratch.state.dtype)
        values = load(scratch.c.at[slot], MATRIX).astype(jnp.float32)
        scratch.weighted[...] = (values * rows(factors.weight, self.tile)).astype(scratch.weighted.dtype)
        plgpu.commit_smem()
        if kind.states:
            pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)(functools.partial(self._keep, chunk))
        state = self._read_out(state, factors, slot, chunk) if kind.output else self._write(state, factors, slot)
        pl.when(step + self.plan.stages < self.steps)(functools.partial(self._fetch, step + self.plan.stages))
        return state

    def _keep(self, chunk) -> None:
        place = self.results.states.at[self.batch, self.head, lax.div(chunk, jnp.int32(ANCHOR)), :, self.columns]
        plgpu.copy_smem_to_gmem(self.scratch.state, place)

    def _write(self, state, factors: Decays, slot):
        """The state after a chunk that nothing is read from."""
        # whole (state + written) inside the range, whole state + written elsewhere.
        before = jnp.where(factors.inside, 1.0, factors.whole)
        (state,) = accumulate([(self.scratch.b.at[slot].T, self.scratch.weighted)], [state * before])
        state = state * jnp.where(factors.inside, factors.whole, 1.0)
        plgpu.commit_smem()
        return state

    def _read_out(self, state, factors: Decays, slot, chunk):
        """Writes out of a chunk; the state after it."""
        out, state = lax.cond(
            factors.inside,
            lambda state: self._products(state, factors, slot, inside=True),
            lambda state: self._products(state, factors, slot, inside=False),
            state,
        )
        # Shares the memory of the weighted values, once no warp's product needs them any more.
        plgpu.commit_smem()
        weighted = self.scratch.weighted
        weighted[...] = out.astype(weighted.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(weighted, self._tokens(self.results.out, chunk, self.columns))
        return state

    def _products(self, state, factors: Decays, slot, inside: bool) -> tuple[jax.Array, jax.Array]:
        """Readout of a chunk and the state after it."""
        scratch = self.scratch
        a, b, c = (ref.at[slot] for ref in (scratch.a, scratch.b, scratch.c))
        scores, from_state = products([(a, b.T), (a, scratch.state)], [SQUARE, self.tile])
        if inside:
            scores = masked(scores, reverse=False)
        else:
            scores = decayed_scores(scores, scratch.gates.at[slot], reverse=False)
            from_state, state = from_state * rows(factors.row, self.tile), state * factors.whole
        values = scratch.weighted if inside else c
        out, state = accumulate([(scores.astype(a.dtype), values), (b.T, scratch.weighted)], [from_state, state])
        if inside:
            out, state = out * rows(factors.row, self.tile), state * factors.whole
        return out, state

"""One program of the Mosaic GPU backward that carries the state's cotangent against time: dk, dv."""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import CHUNK
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
)
from pallas_kernels.hebbian.mosaic_walk import Walk, matrix, tile_types
from pallas_kernels.hebbian.sweep import Plan, Pulled


class Scratch(NamedTuple):
    """Shared memory of a program; dk, dv: results on their way."""

    tiles: Any
    state: Any
    weighted: Any
    dk: Any
    dv: Any
    met: Any


def scratch_types(pulled: Pulled, plan: Plan) -> Scratch:
    width = pulled.v.shape[-1]
    state, tile = matrix(pulled, width, width), matrix(pulled, CHUNK, width)
    return Scratch(tile_types(pulled, plan), state, tile, tile, tile, plgpu.Barrier(num_arrivals=2))


class CarryBack(Walk):
    """The chunks of a segment from the last to the first, by two warpgroups: one computes dk, the other dv.

    Both carry half of the cotangent G where it is 128 wide; else the first carries all of it. In a chunk, rows are
    written tokens j and columns the later ones i that read them; X is dy, times the decays from the entry where these
    are inside the range (`Decays`).
    """

    def extent(self):
        self.segment = lax.axis_index("segment")
        first = self.segment * self.plan.segment
        return first, jnp.minimum(self.plan.segment, self.chunks - first)

    def chunk_at(self, step):
        return self.first + self.steps - 1 - step

    def run(self) -> None:
        """The whole walk."""
        self.begin()
        end, start = (
            self.own(x.at[self.batch, self.head, self.segment]) for x in (self.pulled.end, self.results.start)
        )
        state = self.loop(self._step, load(end, MATRIX, optimized=False))

        @self._where(carrying=True)
        def _leave():
            start[...] = state

        plgpu.wait_smem_to_gmem(0)

    def _where(self, carrying: bool):
        """Decorator of what those warpgroups do that carry G, or those that do not where only one does."""
        if self.panels == 2:
            return lambda do: do()
        return pl.when(self.part == (0 if carrying else 1))

    def _step(self, step, state):
        slot, chunk = self.slot_of(step), self.chunk_at(step)
        plgpu.barrier_wait(self.tiles.arrived.at[slot])
        factors = decays(self.tiles.gates.at[slot], reverse=True)
        if self.panels == 2:
            self.loosen(factors)
        self._where(carrying=True)(functools.partial(self._show, state))
        self._where(carrying=False)(functools.partial(self._weigh, factors, slot))
        self.meet()
        state, out = lax.cond(
            factors.inside,
            functools.partial(self._sides, factors=factors, slot=slot, chunk=chunk, inside=True),
            functools.partial(self._sides, factors=factors, slot=slot, chunk=chunk, inside=False),
            state,
        )
        self._where(carrying=True)(lambda: self.at_anchor(chunk, functools.partial(self._collect, state)))
        self.meet()
        self.fetch(step + self.plan.stages)
        for side, name in enumerate(("dk", "dv")):
            pl.when(self.part == side)(functools.partial(self._send, name, out, chunk))
        return state

    def _show(self, state) -> None:
        self.own(self.scratch.state)[...] = state.astype(self.scratch.state.dtype)

    def _weigh(self, factors: Decays, slot) -> None:
        weighted = self.own(self.scratch.weighted)
        dy = load(self.own(self.tiles.dy.at[slot]), MATRIX).astype(jnp.float32)
        weighted[...] = (dy * rows(factors.weight, SQUARE)).astype(weighted.dtype)

    def _collect(self, state, anchor) -> None:
        """The product of this cotangent and the state that it is the cotangent of."""
        entry = load(self.own(self.pulled.entries.at[self.batch, self.head, anchor]), MATRIX, optimized=False)
        place = (self.part, self.batch, self.head, anchor)
        self.results.paths.anchors.at[place][...] = jnp.sum(entry.astype(jnp.float32) * state, axis=1)

    def _send(self, name: str, x, chunk) -> None:
        place, result = getattr(self.scratch, name), getattr(self.results, name)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        place[...] = x.astype(place.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(place, self.tokens(result, chunk))

    def _sides(self, state, **chunk):
        """The cotangent before a chunk, and dk or dv."""
        of_keys, of_values = (functools.partial(side, **chunk) for side in (self._of_keys, self._of_values))
        return lax.cond(self.part == 0, of_keys, of_values, state)

    def _carried(self, state, factors: Decays, inside: bool, before: bool):
        """The cotangent times the decay of a chunk, applied before the chunk's own part is added or, inside, after."""
        return state * factors.whole if before != inside else state

    def _of_keys(self, state, factors: Decays, slot, chunk, inside: bool):
        """dk_j = eta_j (sum_i D_ij (v_j . dy_i) q_i + f_j G v_j), and the cotangent before the chunk."""
        scratch = self.scratch
        q, v = self.tiles.q.at[slot], self.tiles.v.at[slot]
        x = scratch.weighted if inside else self.tiles.dy.at[slot]
        along, from_state = products([(v, x.T), (v, scratch.state.T)], [SQUARE, self.tile])
        if inside:
            along = masked(along, reverse=True)
        else:
            along = decayed_scores(along, self.tiles.gates.at[slot], reverse=True)
            from_state = from_state * rows(factors.row, self.tile)
        through = self._with_keys(slot, from_state)
        state = self._carried(state, factors, inside, before=True)
        written = (q.T, self.own(scratch.weighted))
        dk, state = accumulate([(along.astype(q.dtype), q), written], [from_state, state])
        state = self._carried(state, factors, inside, before=False)
        if inside:
            dk, through = dk * rows(factors.row, self.tile), through * factors.row
        paths, place = self.results.paths, (0, self.batch, self.head, chunk)
        paths.stored.at[place][...] = through * factors.eta
        paths.deta.at[place][...] = self._with_keys(slot, dk)
        return state, dk * rows(factors.eta, self.tile)

    def _with_keys(self, slot, x) -> jax.Array:
        return jnp.sum(load(self.tiles.k.at[slot], MATRIX).astype(jnp.float32) * x, axis=1)

    def _of_values(self, state, factors: Decays, slot, chunk, inside: bool):
        """dv_j = eta_j (sum_i D_ij (q_i . k_j) dy_i + f_j G^T k_j), and this warpgroup's cotangent before the chunk."""
        scratch = self.scratch
        q, k = self.tiles.q.at[slot], self.tiles.k.at[slot]
        x = scratch.weighted if inside else self.tiles.dy.at[slot]
        scores, from_state = products([(k, q.T), (k, scratch.state)], [SQUARE, self.tile])
        if inside:
            scores = masked(scores, reverse=True)
        else:
            scores = decayed_scores(scores, self.tiles.gates.at[slot], reverse=True)
            from_state = from_state * rows(factors.row, self.tile)
        terms, starts = [(scores.astype(q.dtype), x)], [from_state]
        if self.panels == 2:
            terms.append((q.T, self.own(scratch.weighted)))
            starts.append(self._carried(state, factors, inside, before=True))
        dv, *carried = accumulate(terms, starts)
        if self.panels == 2:
            state = self._carried(carried[0], factors, inside, before=False)
        if inside:
            dv = dv * rows(factors.row, self.tile)
        return state, dv * rows(factors.eta, self.tile)

"""One program of the Mosaic GPU backward that walks from states the forward left, in order of time: dq."""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false
# pyright: reportIndexIssue=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK
from pallas_kernels.hebbian.mosaic_tiles import (
    MATRIX,
    SQUARE,
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
from pallas_kernels.hebbian.mosaic_walk import Walk, matrix, tile_types
from pallas_kernels.hebbian.sweep import Plan, Pulled


class Scratch(NamedTuple):
    """Shared memory of a program; out: a result on its way."""

    tiles: Any
    state: Any
    weighted: Any
    pairs: Any
    out: Any
    met: Any


def scratch_types(pulled: Pulled, plan: Plan) -> Scratch:
    width = pulled.v.shape[-1]
    state, tile = matrix(pulled, width, width), matrix(pulled, CHUNK, width)
    return Scratch(tile_types(pulled, plan), state, tile, tile, tile, plgpu.Barrier(num_arrivals=width // CHUNK))


class ReadAgain(Walk):
    """Some chunks in order of time, by a warpgroup for each 64 columns of dq. It carries as many rows of the state."""

    def extent(self):
        first = lax.axis_index("split") * self.plan.split
        return first, jnp.minimum(self.plan.split, self.chunks - first)

    def chunk_at(self, step):
        return self.first + step

    def run(self) -> None:
        """The whole walk."""
        self.begin()
        anchor = lax.div(self.first, jnp.int32(ANCHOR))
        entry = load(self._rows(self.pulled.entries.at[self.batch, self.head, anchor]), MATRIX, optimized=False)
        self.loop(self._step, entry.astype(jnp.float32))
        plgpu.wait_smem_to_gmem(0)

    def _rows(self, ref):
        return ref if self.panels == 1 else ref.at[pl.ds(self.part * CHUNK, CHUNK)]

    def _step(self, step, state):
        scratch = self.scratch
        slot, chunk = self.slot_of(step), self.chunk_at(step)
        plgpu.barrier_wait(self.tiles.arrived.at[slot])
        factors = decays(self.tiles.gates.at[slot], reverse=False)
        if self.panels == 2:
            self.loosen(factors)
        self._rows(scratch.state)[...] = state.astype(scratch.state.dtype)
        keys = load(self.own(self.tiles.k.at[slot]), MATRIX).astype(jnp.float32)
        self.own(scratch.weighted)[...] = (keys * rows(factors.weight, SQUARE)).astype(scratch.weighted.dtype)
        plgpu.commit_smem()
        state, out = lax.cond(
            factors.inside,
            functools.partial(self._products, factors=factors, slot=slot, chunk=chunk, inside=True),
            functools.partial(self._products, factors=factors, slot=slot, chunk=chunk, inside=False),
            state,
        )
        # The last result has left its place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.meet()
        self.fetch(step + self.plan.stages)
        self.own(scratch.out)[...] = out.astype(scratch.out.dtype)
        self.meet()

        @pl.when(self.part == 0)
        def _send():
            plgpu.copy_smem_to_gmem(scratch.out, self.tokens(self.results.dq, chunk))

        return state

    def _products(self, state, factors: Decays, slot, chunk, inside: bool):
        """dq_i = sum_j D_ij eta_j (dy_i . v_j) k_j + e_i W dy_i, and the state after the chunk."""
        scratch = self.scratch
        v, dy, queries = self.tiles.v.at[slot], self.tiles.dy.at[slot], self.own(self.tiles.q.at[slot])
        weighted = self.own(scratch.weighted)
        keys = weighted if inside else self.own(self.tiles.k.at[slot])
        operands = [(dy, v.T), (dy, self._rows(scratch.state).T), (queries, keys.T)]
        scores, from_state, alike = products(operands, [SQUARE] * 3)
        row = rows(factors.row, SQUARE)
        if inside:
            scores, alike = masked(scores, reverse=False), alike * row
        else:
            scores = decayed_scores(scores, self.tiles.gates.at[slot], reverse=False)
            from_state, state = from_state * row, state * factors.whole
        pairs = self.own(scratch.pairs)
        pairs[...] = (scores * alike).astype(pairs.dtype)
        read = jnp.sum(load(queries, MATRIX).astype(jnp.float32) * from_state, axis=1)
        plgpu.commit_smem()
        terms = [(scores.astype(v.dtype), keys), (weighted.T, v), (self._at_or_after(v.dtype), pairs)]
        out, state, later = accumulate(terms, [from_state, state, plgpu.layout_cast(jnp.zeros_like(scores), MATRIX)])
        if inside:
            out, state, read = out * row, state * factors.whole, read * factors.row
        paths, place = self.results.paths, (self.part, self.batch, self.head, chunk)
        paths.read.at[place][...] = read
        # Of the paths inside the chunk to a token or later, those written before it.
        token, written = positions()
        paths.inside.at[place][...] = jnp.sum(jnp.where(written < token, later, 0.0), axis=1)
        return state, out

    def _at_or_after(self, dtype):
        """Sums over a token's row and all below."""
        row, column = positions()
        return jnp.where(column >= row, 1.0, 0.0).astype(dtype)

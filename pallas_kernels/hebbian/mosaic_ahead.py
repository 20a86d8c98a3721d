"""The Mosaic GPU forward with the scores of a chunk computed one chunk ahead: no product waits for another.

What neither the state nor the next scores wait for is done while the products run: the last readout leaves, and the
next values are weighted.
"""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK
from pallas_kernels.hebbian.mosaic_sweep import Program
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
from pallas_kernels.hebbian.sweep import Kind, Operands, Plan


class Scratch(NamedTuple):
    """Shared memory of a program; weighted: of this chunk and the next; out: a readout on its way."""

    a: Any
    b: Any
    c: Any
    gates: Any
    state: Any
    weighted: Any
    scores: Any
    out: Any
    arrived: Any


def scratch_types(kind: Kind, operands: Operands, plan: Plan) -> Scratch:
    dtype, keys, values, stages = operands.c.dtype, operands.b.shape[-1], plan.values, plan.stages
    transforms = tile_transforms(min(keys, values, CHUNK), dtype)

    def tile(*shape: int):
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    # With two, the tiles of the next chunk would have no room before this one's are read.
    assert kind.output
    assert stages > 2
    read, tokens = tile(stages, CHUNK, keys), (CHUNK, values)
    gates = plgpu.SMEM((stages, 3, CHUNK), jnp.float32)
    arrived = plgpu.Barrier(num_arrivals=4, num_barriers=stages)
    state, weighted, scores = tile(keys, values), tile(2, *tokens), tile(2, *SQUARE)
    return Scratch(read, read, tile(stages, *tokens), gates, state, weighted, scores, tile(*tokens), arrived)


class Ahead(Program):
    """As `mosaic_sweep.Program`, with output.

    A step takes over the state and the decays of its chunk, and in shared memory the scores, the weighted values and
    the last readout.
    """

    def run(self) -> None:
        """The whole walk."""
        for step in range(self.plan.stages):
            pl.when(step < self.steps)(functools.partial(self._fetch, jnp.int32(step)))
        start = load(self._state_of(self.operands.start), MATRIX, optimized=False)
        zero = jnp.int32(0)
        self._show_state(start)
        factors = self._arrive(zero)
        self._weigh(factors, zero)
        (scores,) = products([self._scored(zero)], [SQUARE])
        self._decay(scores, factors, zero)
        state, _ = lax.fori_loop(0, self.steps, self._step, (start, factors))
        plgpu.commit_smem()
        self._send(self.steps - 1)
        self._state_of(self.results.end)[...] = state
        plgpu.wait_smem_to_gmem(0)

    def _arrive(self, step) -> Decays:
        """Of a step's chunk, once its tiles are there; nothing of use after the last."""
        slot = self._slot(step)
        pl.when(step < self.steps)(lambda: plgpu.barrier_wait(self.scratch.arrived.at[slot]))
        return decays(self.scratch.gates.at[slot], reverse=False)

    def _of_two(self, ref, step):
        return ref.at[lax.rem(step, jnp.int32(2))]

    def _weigh(self, factors: Decays, step) -> None:
        weighted = self._of_two(self.scratch.weighted, step)
        values = load(self.scratch.c.at[self._slot(step)], MATRIX).astype(jnp.float32)
        weighted[...] = (values * rows(factors.weight, self.tile)).astype(weighted.dtype)

    def _scored(self, step):
        slot = self._slot(step)
        return self.scratch.a.at[slot], self.scratch.b.at[slot].T

    def _decay(self, scores, factors: Decays, step) -> None:
        """A step's scores as an operand of products."""
        gates, place = self.scratch.gates.at[self._slot(step)], self._of_two(self.scratch.scores, step)
        place[...] = lax.cond(
            factors.inside,
            lambda scores: masked(scores, reverse=False).astype(self.scratch.out.dtype),
            lambda scores: decayed_scores(scores, gates, reverse=False).astype(self.scratch.out.dtype),
            scores,
        )

    def _show_state(self, state) -> None:
        self.scratch.state[...] = state.astype(self.scratch.state.dtype)

    def _show(self, out) -> None:
        """A readout, where the last has left; by then all warps are through with what products read."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.scratch.out[...] = out

    def _send(self, step) -> None:
        """A step's readout, where there is such a step."""

        @pl.when(step >= 0)
        def _copy():
            target = self._tokens(self.results.out, self._chunk(step), self.columns)
            plgpu.copy_smem_to_gmem(self.scratch.out, target)

    def _step(self, step, carry):
        state, factors = carry
        following = self._arrive(step + 1)
        plgpu.commit_smem()
        self._send(step - 1)
        # All warps are through with the last chunk.
        more = step - 1 + self.plan.stages
        pl.when((step > 0) & (more < self.steps))(functools.partial(self._fetch, more))
        chunk = self._chunk(step)
        if self.kind.states:
            pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)(functools.partial(self._keep, chunk))

        forms = (functools.partial(form, factors=factors, step=step) for form in (self._within_range, self._beyond))
        state, out = lax.cond(factors.inside, *forms, state)

        def score(scores):
            plgpu.wgmma(scores, *self._scored(step + 1))
            # Branches would end what runs beside the products: the readout leaves in the next step.
            self._weigh(following, step + 1)
            self._show(out.astype(self.scratch.out.dtype))
            self._show_state(state)
            return scores[...]

        scores = pl.run_scoped(score, plgpu.ACC(SQUARE, jnp.float32))
        self._decay(scores, following, step + 1)
        return state, following

    def _within_range(self, state, factors: Decays, step):
        """The state after the chunk, and the readout."""
        slot = self._slot(step)
        weighted, scores = (self._of_two(x, step) for x in (self.scratch.weighted, self.scratch.scores))
        a, b = self.scratch.a.at[slot], self.scratch.b.at[slot]

        def compute(refs):
            out, after = refs
            plgpu.wgmma(out, a, self.scratch.state)
            plgpu.wgmma(out, scores, weighted)
            plgpu.wgmma(after, b.T, weighted)

        out = plgpu.layout_cast(jnp.zeros(self.tile, jnp.float32), MATRIX)
        out, state = pl.run_state(compute)([plgpu.ACC.init(x) for x in (out, state)])
        return state * factors.whole, out * rows(factors.row, self.tile)

    def _beyond(self, state, factors: Decays, step):
        """The same where the decays of a chunk leave the range."""
        slot = self._slot(step)
        a, b, c = (ref.at[slot] for ref in (self.scratch.a, self.scratch.b, self.scratch.c))
        (from_state,) = products([(a, self.scratch.state)], [self.tile])
        from_state = from_state * rows(factors.row, self.tile)
        terms = [(self._of_two(self.scratch.scores, step), c), (b.T, self._of_two(self.scratch.weighted, step))]
        out, state = accumulate(terms, [from_state, state * factors.whole])
        return state, out

"""What both kernels of the Mosaic GPU backward do: fetch the tiles of one chunk after the other."""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.mosaic_tiles import Decays, tile_transforms
from pallas_kernels.hebbian.sweep import Cotangents, Plan, Pulled


class Tiles(NamedTuple):
    """Shared memory of the chunks in flight, a slot for each, and the barriers that say what has arrived."""

    q: Any
    k: Any
    v: Any
    dy: Any
    gates: Any
    arrived: Any


def matrix(pulled: Pulled, *shape: int) -> Any:
    """Type of an operand of products in shared memory."""
    dtype = pulled.v.dtype
    return plgpu.SMEM(shape, dtype, transforms=tile_transforms(CHUNK, dtype))


def tile_types(pulled: Pulled, plan: Plan) -> Tiles:
    tile, stages = matrix(pulled, plan.stages, CHUNK, pulled.v.shape[-1]), plan.stages
    arrived = plgpu.Barrier(num_arrivals=5, num_barriers=stages)
    return Tiles(tile, tile, tile, tile, plgpu.SMEM((stages, 3, CHUNK), jnp.float32), arrived)


@dataclasses.dataclass
class Walk(abc.ABC):
    """A walk of some warpgroups over some chunks of one head of one batch row.

    pulled, gates, results: references to the arrays of the whole launch; scratch: the program's own shared memory,
    with the fields tiles and met, where its warpgroups wait for each other.
    """

    heads: int
    chunks: int
    plan: Plan
    warpgroups: int
    pulled: Pulled
    gates: Gates
    results: Cotangents
    scratch: Any

    def __post_init__(self):
        stream, heads = lax.axis_index("stream"), jnp.int32(self.heads)
        self.batch, self.head = lax.div(stream, heads), lax.rem(stream, heads)
        self.part = lax.axis_index("part")
        self.tiles: Tiles = self.scratch.tiles
        # Of 64 columns each.
        self.panels = self.tiles.v.shape[-1] // CHUNK
        self.tile = (CHUNK, self.panels * CHUNK)
        self.first, self.steps = self.extent()

    @abc.abstractmethod
    def extent(self) -> tuple[jax.Array, jax.Array]:
        """First chunk and number of chunks."""

    @abc.abstractmethod
    def chunk_at(self, step) -> jax.Array:
        """Chunk of a step."""

    def slot_of(self, step) -> jax.Array:
        """Where the tiles of a step are."""
        return lax.rem(step, jnp.int32(self.plan.stages))

    def loop(self, step, carry):
        """All steps, each from what the last has carried; what a step loosens is as before afterwards."""
        part = self.part

        def body(index, carry):
            self.part = part
            return step(index, carry)

        carry = lax.fori_loop(0, self.steps, body, carry)
        self.part = part
        return carry

    def loosen(self, factors: Decays) -> None:
        """Make the compiler believe that this warpgroup's part changes from step to step.

        It would hold all addresses that follow from the part in registers, and spill others: at width 128 dq takes a
        third longer so. No decay is above 1, but it cannot know.
        """
        self.part = self.part + jnp.where(factors.whole > 2, jnp.int32(1), jnp.int32(0))

    def own(self, ref):
        """This warpgroup's panel of a matrix."""
        return ref if self.panels == 1 else ref.at[:, pl.ds(self.part * CHUNK, CHUNK)]

    def meet(self) -> None:
        """All warpgroups of the program are here, and what they wrote into shared memory is there for products."""
        plgpu.commit_smem()
        if self.warpgroups > 1:
            plgpu.barrier_arrive(self.scratch.met)
            plgpu.barrier_wait(self.scratch.met)

    def tokens(self, ref, chunk):
        return ref.at[self.batch, pl.ds(chunk * CHUNK, CHUNK), self.head]

    def at_anchor(self, chunk, do) -> None:
        """do(anchor) where chunk is the first of a block of ANCHOR."""
        pl.when(lax.rem(chunk, jnp.int32(ANCHOR)) == 0)(lambda: do(lax.div(chunk, jnp.int32(ANCHOR))))

    def begin(self) -> None:
        """Set the first tiles on their way."""
        for step in range(self.plan.stages):
            self.fetch(jnp.int32(step))

    def fetch(self, step) -> None:
        """Set the tiles of a step on their way, where there is such a step."""
        pl.when((self.part == 0) & (step < self.steps))(functools.partial(self._fetch, step))

    def _fetch(self, step) -> None:
        slot, chunk = self.slot_of(step), self.chunk_at(step)
        barrier = self.tiles.arrived.at[slot]
        for name in ("q", "k", "v", "dy"):
            source = self.tokens(getattr(self.pulled, name), chunk)
            plgpu.copy_gmem_to_smem(source, getattr(self.tiles, name).at[slot], barrier)
        source = self.gates.rows.at[self.batch, self.head, chunk]
        plgpu.copy_gmem_to_smem(source, self.tiles.gates.at[slot], barrier)

"""What the Mosaic GPU sweep does with tiles of one chunk: its decays, its mask, its products."""

# The references that kernels work on have no types that a checker could follow.
# pyright: basic, reportArgumentType=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hebbian.gates import CHUNK, RANGE

MATRIX = plgpu.Layout.WGMMA
SQUARE = (CHUNK, CHUNK)


# jax 0.10 wants an index apart from the reference, 0.11 warns of one and 0.12 takes none.
_INDEX = ((),) if jax.__version_info__ < (0, 11) else ()


def tile_transforms(width: int, dtype) -> tuple[Any, ...]:
    """Of tiles in shared memory, in columns of so many elements; wgmma wants both operands of a product alike."""
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(width * jnp.dtype(dtype).itemsize)


def load(ref, layout, optimized: bool = True) -> jax.Array:
    """A reference's values in registers."""
    return plgpu.load(ref, *_INDEX, layout=layout, optimized=optimized)


def rows(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A factor per row, over the whole matrix."""
    return lax.broadcast_in_dim(vector, shape, [0])


def _columns(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(vector, shape, [1])


class Decays(NamedTuple):
    """Factors of a chunk, per row: row what the entering state is worth in the readout, weight that of the values.

    Where the whole decay is within gates.RANGE (inside), D_ij = row_i / row_j, weight is 1 / row (in order of time,
    times eta) and decays need no C x C arithmetic: out_i = row_i (sum_j mask_ij (a_i . b_j) weight_j c_j + a_i S), and
    the next state is whole (S + sum_j weight_j b_j c_j^T). Elsewhere weight is what a write is worth in the leaving
    state.
    """

    row: jax.Array
    weight: jax.Array
    eta: jax.Array
    whole: jax.Array
    inside: jax.Array


def decays(gates_ref, reverse: bool) -> Decays:
    """Of a chunk's gates (3, C): high and low sums of log2 decays, and eta."""
    high, low, eta = (load(gates_ref.at[n], MATRIX.reduce(1)) for n in range(3))
    last_high, last_low = gates_ref[0, CHUNK - 1], gates_ref[1, CHUNK - 1]
    total = last_high + last_low
    inside = total > -RANGE
    shift = jnp.where(inside, total, 0.0)
    from_entry, to_exit = high + low, (last_high - high) + (last_low - low)
    if reverse:
        return Decays(jnp.exp2(to_exit), jnp.exp2(from_entry - shift), eta, jnp.exp2(total), inside)
    return Decays(jnp.exp2(from_entry), jnp.exp2(to_exit - shift) * eta, eta, jnp.exp2(total), inside)


def decayed_scores(scores: jax.Array, gates_ref, reverse: bool) -> jax.Array:
    """Scores times the decays between their tokens (and eta of the written one), 0 where time would run backwards."""
    square = scores.shape
    parts = []
    for part in range(2):
        row = rows(load(gates_ref.at[part], MATRIX.reduce(1)), square)
        column = _columns(load(gates_ref.at[part], MATRIX.reduce(0)), square)
        parts.append(column - row if reverse else row - column)
    scores = scores * jnp.exp2(parts[0] + parts[1])
    if not reverse:
        scores = scores * _columns(load(gates_ref.at[2], MATRIX.reduce(0)), square)
    # Masked after exp2, which overflows on the other side of the diagonal: no gradient passes here.
    return masked(scores, reverse)


def masked(scores: jax.Array, reverse: bool) -> jax.Array:
    """0 where time would run backwards."""
    row, column = positions()
    return jnp.where(column >= row if reverse else column <= row, scores, 0.0)


def positions() -> tuple[jax.Array, jax.Array]:
    """Row and column of every entry of a C x C matrix."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=MATRIX) for axis in range(2))
    return row, column


def products(pairs, shapes) -> list[jax.Array]:
    """Several products in one batch of instructions."""

    def compute(*accs):
        for (a, b), acc in zip(pairs, accs, strict=True):
            plgpu.wgmma(acc, a, b)
        return [acc[...] for acc in accs]

    return pl.run_scoped(compute, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def accumulate(pairs, starts) -> list[jax.Array]:
    """starts plus products, in one batch of instructions."""

    def compute(refs):
        for (a, b), acc in zip(pairs, refs, strict=True):
            plgpu.wgmma(acc, a, b)

    return pl.run_state(compute)([plgpu.ACC.init(start) for start in starts])

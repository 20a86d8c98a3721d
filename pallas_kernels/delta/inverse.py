"""Inverse of many small unit lower triangular matrices by products alone, which a GPU has matrix units for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.products import product

# Up to this size one product with all rows is quicker than slicing.
_WHOLE = 16


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return product("...ij,...jk->...ik", a, b)


def _small_inverse(below: jax.Array) -> jax.Array:
    """The same halving as in unit_lower_inverse, with all blocks of a size in one masked product of the whole."""
    size = below.shape[-1]
    position = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=below.dtype), below.shape)
    half = 1
    while half < size:
        block = position // half
        # Lower left quarters of the blocks of 2 half.
        joins = (block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1)
        quarter = jnp.where(joins, below, 0)
        inverse = inverse - (quarter if half == 1 else _times(_times(inverse, quarter), inverse))
        half *= 2
    return inverse


def unit_lower_inverse(below: jax.Array) -> jax.Array:
    """(I + below)^-1 for strictly lower triangular below (..., C, C) of any float dtype, C a power of two.

    By halves: [[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]] (Higham, "Accuracy and Stability of Numerical
    Algorithms", 2002, section 14.2). All intermediate results are parts of the inverse or small combinations of them.
    The shorter product (I - A)(I + A^2)(I + A^4)... is no choice: for equal keys the powers of A reach 1e18 and cancel.
    """
    size = below.shape[-1]
    if size <= _WHOLE:
        return _small_inverse(below)
    half = size // 2
    first, second = unit_lower_inverse(jnp.stack([below[..., :half, :half], below[..., half:, half:]]))
    corner = -_times(_times(second, below[..., half:, :half]), first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([corner, second], axis=-1)], axis=-2)

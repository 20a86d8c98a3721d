"""Complex arithmetic on (re, im) pairs of real arrays: kernels on a GPU have no complex type, so no form uses one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


def add(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def subtract(a: Pair, b: Pair) -> Pair:
    return a[0] - b[0], a[1] - b[1]


def scale(real: jax.Array, a: Pair) -> Pair:
    return real * a[0], real * a[1]


def multiply(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


# Below this a denominator counts as a pole.
_POLE = 1e-10


def reciprocal(a: Pair) -> Pair:
    """1 / a, scaled by the larger part first: |a|^2 itself overflows (and underflows) long before a does.

    An a closer to zero than 1e-10 counts as -1e-10 i: large and finite, and on the side of the Green's function. Only a
    chain without damping or with u < 0 can come there, by exact cancellation.
    """
    size = jnp.maximum(jnp.abs(a[0]), jnp.abs(a[1]))
    pole = size < _POLE
    size = jnp.where(pole, _POLE, size)
    re, im = a[0] / size, jnp.where(pole, -1, a[1] / size)
    factor = 1 / (size * (re * re + im * im))
    return re * factor, -im * factor

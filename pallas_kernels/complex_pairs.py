"""Complex arithmetic on (re, im) pairs of real arrays; GPU kernels have no complex type, so no form of a scan uses one."""

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


def reciprocal(a: Pair) -> Pair:
    """1 / a, scaled by the larger part first: |a|^2 itself overflows (and underflows) long before a does."""
    size = jnp.maximum(jnp.abs(a[0]), jnp.abs(a[1]))
    re, im = a[0] / size, a[1] / size
    factor = 1 / (size * (re * re + im * im))
    return re * factor, -im * factor

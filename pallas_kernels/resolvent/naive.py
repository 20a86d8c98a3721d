"""The law of the resolvent scan, one token at a time; every other implementation is tested against it.

All functions take x = v - i gamma - z as a pair of (B, N, H) arrays and the coupling u (B, N, H), where u_t couples
t - 1 and t and is zero where a reset cuts the chain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import complex_pairs
from pallas_kernels.complex_pairs import Pair


def scan(x: Pair, u_BxNxH: jax.Array, initial_g: Pair) -> Pair:
    """g_t = 1 / (x_t - u_t g_{t-1}), by lax.scan over the tokens."""

    def body(g: Pair, xs) -> tuple[Pair, Pair]:
        x_t, u_t = xs
        g = complex_pairs.reciprocal(complex_pairs.subtract(x_t, complex_pairs.scale(u_t, g)))
        return g, g

    tokens_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (x, u_BxNxH))
    _, g = jax.lax.scan(body, initial_g, tokens_first)
    return jnp.moveaxis(g[0], 0, 1), jnp.moveaxis(g[1], 0, 1)


def diagonal(x: Pair, u_BxNxH: jax.Array) -> Pair:
    """G_tt = 1 / (x_t - u_t gL_{t-1} - u_{t+1} gR_{t+1}), from the continued fractions of both sides."""
    u = u_BxNxH.at[:, 0].set(0)
    u_after = jnp.concatenate([u[:, 1:], jnp.zeros_like(u[:, :1])], axis=1)
    zero = (jnp.zeros_like(u[:, 0]), jnp.zeros_like(u[:, 0]))
    left = scan(x, u, zero)
    flipped = (jnp.flip(x[0], 1), jnp.flip(x[1], 1))
    right = scan(flipped, jnp.flip(u_after, 1), zero)
    left_before = [jnp.pad(part[:, :-1], ((0, 0), (1, 0), (0, 0))) for part in left]
    right_after = [jnp.pad(jnp.flip(part, 1)[:, 1:], ((0, 0), (0, 1), (0, 0))) for part in right]
    return complex_pairs.reciprocal(
        (
            x[0] - u * left_before[0] - u_after * right_after[0],
            x[1] - u * left_before[1] - u_after * right_after[1],
        )
    )

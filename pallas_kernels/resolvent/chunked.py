"""Chunked form of the resolvent scan for any device: all chunks side by side, O(N) work, exact.

A chunk of the chain acts on the g that comes in as a Moebius map. In the isolated chunk's own Green's function,
    g_out = g_nn + w g_in / (1 - kappa g_in),   kappa = u_1 G_11,   w = u_1 G_n1^2 (couplings taken into G_n1)
with g_nn its continued fraction started from nothing. One more site (x, u) with g = 1 / (x - u g_nn) turns it into
    g_nn <- g,   kappa <- kappa + u g w,   w <- u g^2 w
This is the product of the companion matrices [[0, 1], [-u, x]], but for u >= 0 every factor is a bounded Green's
function: nothing has to be rescaled, a distant g_in fades by underflow to exactly zero, and a cut (u = 0) gives
exactly w = 0. Pass 1 builds the maps of all chunks, pass 2 walks over them, pass 3 runs the continued fraction inside
the chunks from the exact incoming g, so that rounding does not accumulate over chunks.

The backward is the reverse linear recurrence lam_t = cot_t + u_{t+1} g_{t+1}^2 lam_{t+1}, chunked alike. The cotangent
of a pair is kept as the complex number c with dF = Re(c dg), that is c = F_re - i F_im, for which plain complex
differentiation holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import complex_pairs as cp
from pallas_kernels.chunking import from_lanes, lane_chunk_length, pad_tokens, to_lanes, walk
from pallas_kernels.complex_pairs import Pair


def _lanes(pair: Pair, chunk: int, padding: tuple[float, float] = (0.0, 0.0)) -> Pair:
    re, im = (to_lanes(pad_tokens(part, chunk, value), chunk) for part, value in zip(pair, padding, strict=True))
    return re, im


def _tokens(pair: Pair, num_tokens: int) -> Pair:
    return from_lanes(pair[0], num_tokens), from_lanes(pair[1], num_tokens)


def _site(x: Pair, u: jax.Array, g: Pair) -> Pair:
    return cp.reciprocal(cp.subtract(x, cp.scale(u, g)))


def _chunk_maps(x: Pair, u_CxBxMxH: jax.Array) -> tuple[Pair, Pair, Pair]:
    """(g_nn, w, kappa) of every chunk, each a pair of (B, M, H)."""

    def body(carry, xs):
        g, w, kappa = carry
        x_t, u_t = xs
        g = _site(x_t, u_t, g)
        w = cp.multiply(cp.scale(u_t, g), w)
        return (g, cp.multiply(g, w), cp.add(kappa, w)), None

    first = cp.reciprocal((x[0][0], x[1][0]))
    kappa = cp.scale(u_CxBxMxH[0], first)
    start = (first, cp.multiply(kappa, first), kappa)
    rest = ((x[0][1:], x[1][1:]), u_CxBxMxH[1:])
    maps, _ = walk(body, start, rest)
    return maps


def _entry_values(maps: tuple[Pair, Pair, Pair], initial_g: Pair) -> Pair:
    """The g that enters every chunk, a pair of (B, M, H)."""

    def body(g, chunk_map):
        g_nn, w, kappa = chunk_map
        kept = cp.multiply(kappa, g)
        passed = cp.multiply(cp.multiply(w, g), cp.reciprocal((1 - kept[0], -kept[1])))
        return cp.add(g_nn, passed), g

    chunks_first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), maps)
    _, entries = walk(body, initial_g, chunks_first)
    return jnp.moveaxis(entries[0], 0, 1), jnp.moveaxis(entries[1], 0, 1)


def _forward(x: Pair, u: jax.Array, initial_g: Pair, chunk: int) -> Pair:
    num_tokens = u.shape[1]
    # A padded site is cut off (u = 0) and regular (x = 1).
    x_lanes, u_lanes = _lanes(x, chunk, (1.0, 0.0)), to_lanes(pad_tokens(u, chunk), chunk)
    entries = _entry_values(_chunk_maps(x_lanes, u_lanes), initial_g)

    def body(g, xs):
        x_t, u_t = xs
        g = _site(x_t, u_t, g)
        return g, g

    _, g = walk(body, entries, (x_lanes, u_lanes))
    return _tokens(g, num_tokens)


def _reverse_linear(factor: Pair, added: Pair, chunk: int) -> Pair:
    """lam_t = added_t + factor_{t+1} lam_{t+1}; all pairs of (B, N, H)."""
    num_tokens = added[0].shape[1]
    following = tuple(jnp.pad(part[:, 1:], ((0, 0), (0, 1), (0, 0))) for part in factor)
    lanes = (_lanes((following[0], following[1]), chunk), _lanes(added, chunk))

    def inside(carry: tuple[Pair, Pair], xs):
        lam, fade = carry
        factor_t, added_t = xs
        lam, fade = cp.add(added_t, cp.multiply(factor_t, lam)), cp.multiply(factor_t, fade)
        return (lam, fade), (lam, fade)

    zero = jnp.zeros_like(lanes[0][0][0])
    start = ((zero, zero), (zero + 1, zero))
    _, (local, fade) = walk(inside, start, lanes, reverse=True)

    def across(lam, xs):
        local_m, fade_m = xs
        return cp.add(local_m, cp.multiply(fade_m, lam)), lam

    firsts = jax.tree.map(lambda a: jnp.moveaxis(a[0], 1, 0), (local, fade))
    nothing = (zero[:, 0], zero[:, 0])
    _, coming = walk(across, nothing, firsts, reverse=True)
    coming = jnp.moveaxis(coming[0], 0, 1), jnp.moveaxis(coming[1], 0, 1)
    return _tokens(cp.add(local, cp.multiply(fade, coming)), num_tokens)


def _backward(chunk: int, residuals, cotangent: Pair):
    u, initial_g, g = residuals
    square = cp.multiply(g, g)
    lam = _reverse_linear(cp.scale(u, square), (cotangent[0], -cotangent[1]), chunk)
    slope = cp.multiply(lam, square)
    before_re, before_im = (
        jnp.concatenate([start[:, None], part[:, :-1]], axis=1) for start, part in zip(initial_g, g, strict=True)
    )
    du = slope[0] * before_re - slope[1] * before_im
    dinitial = (u[:, 0] * slope[0][:, 0], -u[:, 0] * slope[1][:, 0])
    # dg = -g^2 dx, and F_x_im = -Im of the complex cotangent.
    return (-slope[0], slope[1]), du, dinitial


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scan(x: Pair, u: jax.Array, initial_g: Pair, chunk: int) -> Pair:
    return _forward(x, u, initial_g, chunk)


def _scan_fwd(x: Pair, u: jax.Array, initial_g: Pair, chunk: int):
    g = _forward(x, u, initial_g, chunk)
    return g, (u, initial_g, g)


_scan.defvjp(_scan_fwd, _backward)


def scan(x: Pair, u_BxNxH: jax.Array, initial_g: Pair, *, chunk: int | None = None) -> Pair:
    """g_t = 1 / (x_t - u_t g_{t-1}) in chunks; arguments and result as naive.scan, gradients by adjoint recursion."""
    if chunk is None:
        chunk = lane_chunk_length(u_BxNxH.shape[1])
    return _scan(x, u_BxNxH, initial_g, min(chunk, u_BxNxH.shape[1]))


@jax.custom_vjp
def _join_sides(x: Pair, u: jax.Array, u_after: jax.Array, left_before: Pair, right_after: Pair) -> Pair:
    neighbours = cp.add(cp.scale(u, left_before), cp.scale(u_after, right_after))
    return cp.reciprocal(cp.subtract(x, neighbours))


def _join_sides_fwd(x, u, u_after, left_before, right_after):
    g = _join_sides(x, u, u_after, left_before, right_after)
    return g, (u, u_after, left_before, right_after, g)


def _join_sides_bwd(residuals, cotangent: Pair):
    u, u_after, left_before, right_after, g = residuals
    slope = cp.multiply((cotangent[0], -cotangent[1]), cp.multiply(g, g))
    conjugate = (slope[0], -slope[1])
    return (
        (-slope[0], slope[1]),
        slope[0] * left_before[0] - slope[1] * left_before[1],
        slope[0] * right_after[0] - slope[1] * right_after[1],
        cp.scale(u, conjugate),
        cp.scale(u_after, conjugate),
    )


_join_sides.defvjp(_join_sides_fwd, _join_sides_bwd)


def diagonal(x: Pair, u_BxNxH: jax.Array, *, causal: Callable[[Pair, jax.Array, Pair], Pair] = scan) -> Pair:
    """The exact diagonal G_tt, as naive.diagonal: both continued fractions in one causal scan of twice the batch."""
    batch = u_BxNxH.shape[0]
    u = u_BxNxH.at[:, 0].set(0)
    u_after = jnp.concatenate([u[:, 1:], jnp.zeros_like(u[:, :1])], axis=1)
    both_x = (
        jnp.concatenate([x[0], jnp.flip(x[0], 1)]),
        jnp.concatenate([x[1], jnp.flip(x[1], 1)]),
    )
    both_u = jnp.concatenate([u, jnp.flip(u_after, 1)])
    zero = jnp.zeros_like(both_u[:, 0])
    sides = causal(both_x, both_u, (zero, zero))
    left_re, left_im = (jnp.pad(part[:batch, :-1], ((0, 0), (1, 0), (0, 0))) for part in sides)
    right_re, right_im = (jnp.pad(jnp.flip(part[batch:, :-1], 1), ((0, 0), (0, 1), (0, 0))) for part in sides)
    return _join_sides(x, u, u_after, (left_re, left_im), (right_re, right_im))

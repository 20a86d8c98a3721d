"""The passes of `lanes.py` in plain JAX, step for step what the GPU kernels do: their algebra is tested through it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import complex_pairs as cp
from pallas_kernels.chunking import from_lanes, pad_tokens, to_lanes
from pallas_kernels.complex_pairs import Pair
from pallas_kernels.resolvent.lanes import Backend

# n of the first and second column, then d of them.
Map = tuple[Pair, Pair, Pair, Pair]


def _lanes(pair: Pair, chunk: int, padding: tuple[float, float] = (0.0, 0.0)) -> Pair:
    re, im = (to_lanes(pad_tokens(part, chunk, value), chunk) for part, value in zip(pair, padding, strict=True))
    return re, im


def _tokens(pair: Pair, num_tokens: int) -> Pair:
    return from_lanes(pair[0], num_tokens), from_lanes(pair[1], num_tokens)


def _rescaled(matrix: Map) -> Map:
    """Largest part in [1/16, 1/8): room for the next site's parts up to the largest floats."""
    largest = jnp.max(jnp.abs(jnp.stack(jax.tree.leaves(matrix))), axis=0)
    exponent = jnp.frexp(jnp.maximum(largest, jnp.finfo(largest.dtype).tiny))[1]
    scale = jnp.ldexp(jnp.ones_like(largest), -jnp.minimum(exponent, 123) - 3)
    return jax.tree.map(lambda part: part * scale, matrix)


def _maps(x: Pair, u: jax.Array) -> Map:
    """Of every chunk (B, M, H), from lanes."""

    def body(matrix: Map, xs):
        (n1, n2, d1, d2), (x_t, u_t) = matrix, xs
        d1_new, d2_new = (cp.subtract(cp.multiply(x_t, d), cp.scale(u_t, n)) for n, d in ((n1, d1), (n2, d2)))
        return _rescaled((d1, d2, d1_new, d2_new)), None

    zero = jnp.zeros_like(u[0])
    one = zero + 1
    matrix, _ = jax.lax.scan(body, ((one, zero), (zero, zero), (zero, zero), (one, zero)), (x, u))
    return matrix


def _then(first: Map, second: Map) -> Map:
    """second after first: the matrix product second first."""

    def entry(left: tuple[Pair, Pair], right: tuple[Pair, Pair]) -> Pair:
        return cp.add(cp.multiply(left[0], right[0]), cp.multiply(left[1], right[1]))

    (n1, n2, d1, d2), (n1_, n2_, d1_, d2_) = first, second
    return _rescaled(
        (
            entry((n1_, n2_), (n1, d1)),
            entry((n1_, n2_), (n2, d2)),
            entry((d1_, d2_), (n1, d1)),
            entry((d1_, d2_), (n2, d2)),
        )
    )


def _entries(maps: Map, initial_g: Pair) -> Pair:
    """The g that enters every chunk."""

    def before(part, identity):
        return jnp.concatenate([jnp.full_like(part[:, :1], identity), part[:, :-1]], axis=1)

    (n1, n2, d1, d2) = (
        (before(pair[0], identity), before(pair[1], 0.0))
        for pair, identity in zip(maps, (1.0, 0.0, 0.0, 1.0), strict=True)
    )
    n1, n2, d1, d2 = jax.lax.associative_scan(_then, (n1, n2, d1, d2), axis=1)
    start = (initial_g[0][:, None], initial_g[1][:, None])
    return cp.multiply(cp.add(cp.multiply(n1, start), n2), cp.reciprocal(cp.add(cp.multiply(d1, start), d2)))


def forward(x: Pair, u: jax.Array, initial_g: Pair, chunk: int) -> tuple[Pair, Pair]:
    num_tokens = u.shape[1]
    # A site added at the end is cut off (u = 0) and regular (x = 1).
    x_lanes, u_lanes = _lanes(x, chunk, (1.0, 0.0)), to_lanes(pad_tokens(u, chunk), chunk)
    entries = _entries(_maps(x_lanes, u_lanes), initial_g)

    def body(g, xs):
        x_t, u_t = xs
        g = cp.reciprocal(cp.subtract(x_t, cp.scale(u_t, g)))
        return g, g

    _, g = jax.lax.scan(body, entries, (x_lanes, u_lanes))
    return _tokens(g, num_tokens), entries


def backward(u: jax.Array, g: Pair, entries: Pair, cotangent: Pair, chunk: int) -> tuple[Pair, jax.Array]:
    num_tokens = u.shape[1]
    u_lanes, g_lanes, cotangent_lanes = (
        to_lanes(pad_tokens(u, chunk), chunk),
        _lanes(g, chunk),
        _lanes(cotangent, chunk),
    )
    square = cp.multiply(g_lanes, g_lanes)

    def local(carry, xs):
        (added, kept), (u_t, square_t, cotangent_t) = carry, xs
        factor = cp.scale(u_t, square_t)
        return (cp.multiply(factor, cp.add(cotangent_t, added)), cp.multiply(factor, kept)), None

    zero = jnp.zeros_like(u_lanes[0])
    chunks, _ = jax.lax.scan(local, ((zero, zero), (zero + 1, zero)), (u_lanes, square, cotangent_lanes), reverse=True)

    def then(first, second):
        return cp.add(second[0], cp.multiply(second[1], first[0])), cp.multiply(second[1], first[1])

    added, _ = jax.lax.associative_scan(then, chunks, axis=1, reverse=True)
    incoming = jax.tree.map(lambda part: jnp.pad(part[:, 1:], ((0, 0), (0, 1), (0, 0))), added)

    def adjoint(carry, xs):
        u_t, square_t, cotangent_t = xs
        slope = cp.multiply(cp.add(cotangent_t, carry), square_t)
        return cp.scale(u_t, slope), slope

    _, slope = jax.lax.scan(adjoint, incoming, (u_lanes, square, cotangent_lanes), reverse=True)
    before = tuple(jnp.concatenate([entry[None], part[:-1]]) for entry, part in zip(entries, g_lanes, strict=True))
    du = slope[0] * before[0] - slope[1] * before[1]
    return _tokens((-slope[0], slope[1]), num_tokens), from_lanes(du, num_tokens)


BACKEND = Backend(forward, backward)

"""A sweep in plain JAX, tile for tile what the GPU kernels do, for any device: their tiling is tested through it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.sweep import Fused, Kind, Operands, Plan, Swept


def _product(a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    """Operands rounded to the inputs' dtype, sums in float32."""
    return jnp.matmul(
        a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


def _chunks(x_BxNxHxK: jax.Array, plan: Plan) -> jax.Array:
    """(segment's chunks, B, H, S, C, K), zeros where the last segment is short."""
    batch, _, heads, width = x_BxNxHxK.shape
    tokens = plan.segment * CHUNK
    padded = jnp.pad(x_BxNxHxK, ((0, 0), (0, -x_BxNxHxK.shape[1] % tokens), (0, 0), (0, 0)))
    return jnp.moveaxis(padded.reshape(batch, -1, plan.segment, CHUNK, heads, width), (2, 4), (0, 2))


def _tokens(x: jax.Array, num_tokens: int) -> jax.Array:
    """Inverse of _chunks."""
    moved = jnp.moveaxis(x, (0, 2), (2, 4))
    return moved.reshape(moved.shape[0], -1, *moved.shape[4:])[:, :num_tokens]


def _vectors(x_BxHxMxC: jax.Array, plan: Plan) -> jax.Array:
    """(segment's chunks, B, H, S, C) of a float per token."""
    batch, heads, chunks, _ = x_BxHxMxC.shape
    padded = jnp.pad(x_BxHxMxC, ((0, 0), (0, 0), (0, -chunks % plan.segment), (0, 0)))
    return jnp.moveaxis(padded.reshape(batch, heads, -1, plan.segment, CHUNK), 3, 0)


def _per_chunk(x: jax.Array, chunks: int) -> jax.Array:
    """(segment's chunks, B, H, S, ...) to (B, H, M, ...)."""
    moved = jnp.moveaxis(x, 0, 3)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])[:, :, :chunks]


def _sweep(kind: Kind, operands: Operands, gates: Gates, plan: Plan) -> Swept:
    a, b, c, start, x = operands
    dtype, chunks, num_tokens = c.dtype, gates.eta.shape[2], c.shape[1]
    position = jnp.arange(CHUNK)
    reached = position[:, None] <= position if kind.reverse else position[:, None] >= position
    at_or_after = (position[:, None] <= position).astype(dtype)
    extra = x if kind.collect in ("paths", "rows") else None
    tiles = [None if t is None else _chunks(t, plan) for t in (a if kind.output else None, b, c, extra)]
    high, low, eta = (_vectors(g, plan) for g in (gates.sums[..., 0, :], gates.sums[..., 1, :], gates.eta))

    def body(state, xs):
        (a, b, c, x), hi, lo, eta = xs
        entry, leave = jnp.exp2(hi + lo), jnp.exp2((hi[..., -1:] - hi) + (lo[..., -1:] - lo))
        between = (hi[..., :, None] - hi[..., None, :]) + (lo[..., :, None] - lo[..., None, :])
        if kind.reverse:
            between, entry, leave = -between, leave, entry
        else:
            leave = leave * eta
        out = collected = None
        if kind.output:
            from_state = _product(a, state, dtype) * entry[..., None]
            scores = jnp.where(reached, _product(a, jnp.swapaxes(b, -1, -2), dtype) * jnp.exp2(between), 0)
            if not kind.reverse:
                scores = scores * eta[..., None, :]
            out = from_state + _product(scores, c, dtype)
            if kind.collect == "paths":
                pairs = scores * _product(x, jnp.swapaxes(c, -1, -2), dtype)
                later = _product(at_or_after, pairs, dtype)
                inside = jnp.sum(jnp.where(position < position[:, None], later, 0), -1)
                collected = jnp.stack([inside, jnp.sum(x * from_state, -1)])
            elif kind.collect == "rows":
                collected = jnp.stack([jnp.sum(x * from_state, -1) * eta, jnp.sum(x * out, -1)])
            if kind.reverse:
                out = out * eta[..., None]
            out = out.astype(dtype)
        written = _product(jnp.swapaxes(b, -1, -2), c * leave[..., None], dtype)
        after = state * jnp.exp2(hi[..., -1] + lo[..., -1])[..., None, None] + written
        return after, (out, collected, after if kind.reverse else state)

    end, (out, collected, states) = jax.lax.scan(body, start, (tiles, high, low, eta), reverse=kind.reverse)
    if collected is not None:
        collected = jnp.stack([_per_chunk(part, chunks) for part in jnp.moveaxis(collected, 1, 0)])[:, None]
    elif kind.collect:
        collected = _per_chunk(states, chunks)[:, :, ::ANCHOR]
        collected = collected.astype(dtype) if x is None else jnp.sum(collected * x, -1)[None]
    return Swept(None if out is None else _tokens(out, num_tokens), end, collected)


def run(kinds: tuple[Kind, ...], operands: tuple[Operands, ...], gates: Gates, plan: Plan) -> tuple[Swept, ...]:
    return tuple(_sweep(kind, these, gates, plan) for kind, these in zip(kinds, operands, strict=True))


def fused(segment: int) -> Fused:
    """The fused form through this backend in segments of so many chunks (a multiple of ANCHOR)."""

    def plan(batch: int, chunks: int, heads: int, keys: int, values: int, itemsize: int) -> Plan:
        del batch, heads, keys, itemsize
        return Plan(values, 1, min(segment, chunks))

    return Fused(run, plan)

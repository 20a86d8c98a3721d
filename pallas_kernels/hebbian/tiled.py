"""The fused form in plain JAX, tile for tile what the GPU kernels do: their tiling is tested with it on any device."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, RANGE, Gates, Paths
from pallas_kernels.hebbian.sweep import Cotangents, Fused, Kind, Operands, Plan, Pulled, Swept


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


class Decays(NamedTuple):
    """Of chunks side by side, as kernels apply them: to scores (..., C, C), to what a readout has from the state and to
    all of it (..., C), to what is read and to what is written (..., C), to the state before and after a write (...).
    """

    scores: jax.Array
    entering: jax.Array
    readout: jax.Array
    reads: jax.Array
    writes: jax.Array
    before: jax.Array
    after: jax.Array


def _decays(high: jax.Array, low: jax.Array, reverse: bool) -> Decays:
    """Factored where the whole decay of a chunk is within RANGE. In reverse, rows are written tokens."""
    position = jnp.arange(CHUNK)
    between = (high[..., :, None] - high[..., None, :]) + (low[..., :, None] - low[..., None, :])
    mask = position[:, None] >= position
    between = jnp.where(mask, jnp.exp2(between), 0)
    from_entry, to_exit = high + low, (high[..., -1:] - high) + (low[..., -1:] - low)
    total = high[..., -1] + low[..., -1]
    if reverse:
        mask, between, from_entry, to_exit = mask.T, _swap(between), to_exit, from_entry
    row, inside = jnp.exp2(from_entry), total > -RANGE
    inside_1, inside_2 = inside[..., None], inside[..., None, None]
    weight = jnp.exp2(to_exit - jnp.where(inside_1, total[..., None], 0))
    return Decays(
        jnp.where(inside_2, mask, between),
        jnp.where(inside_1, 1, row),
        jnp.where(inside_1, row, 1),
        jnp.where(inside_1, weight, 1),
        weight,
        jnp.where(inside, 1, jnp.exp2(total)),
        jnp.where(inside, jnp.exp2(total), 1),
    )


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


def _gates(gates: Gates, plan: Plan) -> tuple[jax.Array, ...]:
    """High and low sums and eta."""
    return tuple(_vectors(gates.rows[..., row, :], plan) for row in range(3))


def _in_order(operands: Operands, gates: Gates, plan: Plan, x: jax.Array | None = None, output: bool = True):
    """Along time: final state, then per chunk what is read, the products with x of its part from the state and of that
    from the chunk (of this, the paths to each token or later from tokens before it), the state before.
    """
    tiles = [_chunks(t, plan) for t in (operands.a, operands.b, operands.c, operands.a if x is None else x)]
    dtype, position = operands.c.dtype, jnp.arange(CHUNK)
    at_or_after = (position >= position[:, None]).astype(dtype)

    def body(state, xs):
        (a, b, c, x), (high, low, eta) = xs
        decays = _decays(high, low, reverse=False)
        out = read = inside = None
        if output:
            read_c = c * (decays.reads * eta)[..., None]
            from_state = _product(a, state, dtype) * decays.entering[..., None]
            scores = _product(a, _swap(b), dtype) * decays.scores
            out = ((from_state + _product(scores, read_c, dtype)) * decays.readout[..., None]).astype(dtype)
            read = jnp.sum(x * from_state, -1) * decays.readout
            alike = _product(x, _swap(read_c), dtype) * decays.readout[..., None]
            later = _product(at_or_after, scores * alike, dtype)
            inside = jnp.sum(jnp.where(position < position[:, None], later, 0), -1)
        written = _product(_swap(b), c * (decays.writes * eta)[..., None], dtype)
        after = (state * decays.before[..., None, None] + written) * decays.after[..., None, None]
        return after, (out, read, inside, state)

    return jax.lax.scan(body, operands.start, (tiles, _gates(gates, plan)))


def _against_time(pulled: Pulled, gates: Gates, plan: Plan):
    """Cotangent of the state before each segment, then per chunk those of k and v, the collected vectors and itself."""
    tiles = [_chunks(t, plan) for t in (pulled.q, pulled.k, pulled.v, pulled.dy)]
    dtype = pulled.v.dtype

    def body(state, xs):
        (q, k, v, dy), (high, low, eta) = xs
        # Rows are written tokens, columns the later ones that read them.
        decays = _decays(high, low, reverse=True)
        entering, readout, strength = (x[..., None] for x in (decays.entering, decays.readout, eta))
        read_dy = dy * decays.reads[..., None]
        along = _product(v, _swap(read_dy), dtype) * decays.scores
        scores = _product(k, _swap(q), dtype) * decays.scores
        of_state = _product(v, _swap(state), dtype) * entering
        dk = (of_state + _product(along, q, dtype)) * readout
        dv = (_product(k, state, dtype) * entering + _product(scores, read_dy, dtype)) * readout
        vectors = jnp.sum(k * of_state, -1) * decays.readout * eta, jnp.sum(k * dk, -1)
        written = _product(_swap(q), dy * decays.writes[..., None], dtype)
        state = (state * decays.before[..., None, None] + written) * decays.after[..., None, None]
        return state, ((dk * strength).astype(dtype), (dv * strength).astype(dtype), vectors, state)

    return jax.lax.scan(body, pulled.end, (tiles, _gates(gates, plan)), reverse=True)


def forward(kind: Kind, operands: Operands, gates: Gates, plan: Plan) -> Swept:
    chunks, num_tokens = gates.eta.shape[2], operands.c.shape[1]
    if kind.reverse:
        end = _against_time(
            Pulled(operands.b, operands.b, operands.c, operands.c, operands.start, operands.start), gates, plan
        )[0]
        return Swept(None, end, None)
    end, (out, _, _, states) = _in_order(operands, gates, plan, output=kind.output)
    states = _per_chunk(states, chunks)[:, :, ::ANCHOR].astype(operands.c.dtype) if kind.states else None
    return Swept(None if out is None else _tokens(out, num_tokens), end, states)


def backward(pulled: Pulled, gates: Gates, plan: Plan) -> Cotangents:
    chunks, num_tokens = gates.eta.shape[2], pulled.v.shape[1]
    start, (dk, dv, vectors, states) = _against_time(pulled, gates, plan)
    anchors = jnp.sum(_per_chunk(states, chunks)[:, :, ::ANCHOR] * pulled.entries, -1)
    walks = dataclasses.replace(plan, segment=plan.split)
    entries = _swap(pulled.entries[:, :, :: plan.split // ANCHOR]).astype(jnp.float32)
    by_values = Operands(pulled.dy, pulled.v, pulled.k, entries)
    _, (dq, read, inside, _) = _in_order(by_values, gates, walks, x=pulled.q)
    assert dq is not None
    assert read is not None
    assert inside is not None
    paths = Paths._make([*(_per_chunk(x, chunks)[None] for x in (inside, read, *vectors)), anchors[None]])
    dq, dk, dv = (_tokens(x, num_tokens) for x in (dq, dk, dv))
    return Cotangents(dq, dk, dv, start, paths)


def fused(segment: int) -> Fused:
    """The fused form through this backend in segments of so many chunks (a multiple of ANCHOR), dq in walks from every
    second of the kept states, widths in steps of 8.
    """

    def plan(batch: int, chunks: int, heads: int, width: int, itemsize: int) -> Plan:
        del batch, heads, itemsize
        return Plan(width, 1, min(segment, chunks), split=2 * ANCHOR)

    return Fused(forward, backward, plan, plan, widths=(8, 16))

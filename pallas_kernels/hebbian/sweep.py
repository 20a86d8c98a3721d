"""The fused form of the Hebbian scan: four sweeps of one kind over the chunks, one forward and three for the gradients.

A sweep reads rows a, columns b with values c, and carries a state S from chunk to chunk,
    out_i = r_i (sum_j D_ij w_j (a_i . b_j) c_j + e_i a_i S),    S <- D_whole S + sum_j f_j b_j c_j^T.
In order of time (D_ij the decay from j to i, e from entry to i, f from j to exit, w = eta, r = 1) it is
    y  with (a, b, c) = (q, k, v) and        dq with (dy, v, k) on the transposed state;
against time, with the decays of the reversed paths, w = 1 and r = eta, it carries the cotangent of the state, and is
    dv with (k, q, dy) and                   dk with (v, dy, q) on the transposed cotangent.
So one well-tuned kernel does everything, with the state in registers and no tensor besides inputs and results; kept for
the backward are the inputs and one state in ANCHOR chunks. Two sweeps collect on their way what the decays' cotangent
is made of (`gates.decay_cotangent`).

Where there are too few streams (batch x heads x blocks of values) to fill the device, the sequence is cut into
segments: a first sweep over b and c alone finds what each segment adds to the state, the states between them follow
by one small product, and all segments then run side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from pallas_kernels.batching import over_rows
from pallas_kernels.chunking import pad_tokens
from pallas_kernels.hebbian import gates as gating
from pallas_kernels.hebbian.decays import chunk_decays
from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates
from pallas_kernels.hebbian.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a backend runs a sweep: values per program, loads in flight, chunks per segment (all chunks: one segment)."""

    values: int
    stages: int
    segment: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a sweep does, apart from its operands.

    collect: "" nothing; "states" the state before every ANCHOR-th chunk; "paths" (dq's) and "rows" (dk's) what
    `gates.decay_cotangent` and eta's cotangent need, from the extra operand x; "anchors" (dv's) the product of the
    carried cotangent with the states given as x. output False: only the state is carried, a is not read.
    """

    reverse: bool = False
    collect: str = ""
    output: bool = True


class Operands(NamedTuple):
    """a, b (B, N, H, K), c (B, N, H, V); start (B, H, S, K, V) float32, the state before every segment (after it, in
    reverse); x per kind: (B, N, H, V) for "paths" and "rows", (B, H, A, K, V) for "anchors", else None.
    """

    a: jax.Array
    b: jax.Array
    c: jax.Array
    start: jax.Array
    x: jax.Array | None


class Swept(NamedTuple):
    """out (B, N, H, V) in c's dtype or None; end (B, H, S, K, V) float32; collected, float32 but for states, per kind:
    "states" (B, H, A, K, V) in c's dtype; "paths" (2, P, B, H, M, C), inside the chunk and read; "rows" likewise,
    stored and eta's cotangent; "anchors" (P, B, H, A, K), a row of the product each; to be summed over the P blocks of
    values.
    """

    out: Any
    end: Any
    collected: Any


def result_types(kind: Kind, operands: Operands, gates: Gates, plan: Plan) -> Swept:
    """Shapes and dtypes of what a sweep leaves."""
    batch, heads, chunks, _ = gates.eta.shape
    keys, values = operands.b.shape[-1], operands.c.shape[-1]
    blocks, anchors = values // plan.values, -(-chunks // ANCHOR)
    single = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    collected = {
        "": None,
        "states": jax.ShapeDtypeStruct((batch, heads, anchors, keys, values), operands.c.dtype),
        "paths": single((2, blocks, batch, heads, chunks, CHUNK)),
        "rows": single((2, blocks, batch, heads, chunks, CHUNK)),
        "anchors": single((blocks, batch, heads, anchors, keys)),
    }[kind.collect]
    out = jax.ShapeDtypeStruct(operands.c.shape, operands.c.dtype) if kind.output else None
    return Swept(out, single(operands.start.shape), collected)


def segment_chunks(chunks: int, programs: int) -> int:
    """Chunks per segment, where the sequence as a whole would run in so many programs.

    64 of them and more are left alone: the sweep that a cut costs was dearer on a device of 132 multiprocessors. Fewer
    are cut for about 256 in all.
    """
    segments = 1 if programs >= 64 else min(256 // programs, -(-chunks // ANCHOR))
    length = -(-chunks // segments)
    return min(chunks, -(-length // ANCHOR) * ANCHOR)


# Runs several sweeps over the same tokens, in one launch where it can.
Backend = Callable[[tuple[Kind, ...], tuple[Operands, ...], Gates, Plan], tuple[Swept, ...]]
# Chooses the plan from (B, M, H, K, V, bytes of an element).
Planner = Callable[[int, int, int, int, int, int], Plan]


@dataclasses.dataclass(frozen=True)
class Fused:
    """One implementation of the fused form."""

    backend: Backend
    plan: Planner


def _transpose(state: jax.Array) -> jax.Array:
    return jnp.swapaxes(state, -1, -2)


def _run_one(fused: Fused, kind: Kind, operands: Operands, gates: Gates, plan: Plan) -> Swept:
    return fused.backend((kind,), (operands,), gates, plan)[0]


def _segment_starts(fused: Fused, operands: Operands, carried: jax.Array, gates: Gates, plan: Plan, reverse: bool):
    """The state (B, H, S, K, V) that enters every segment; carried enters the first (reverse: the last)."""
    chunks = gates.eta.shape[2]
    segments = -(-chunks // plan.segment)
    if segments == 1:
        return carried[:, :, None]
    nothing = jnp.zeros((*carried.shape[:2], segments, *carried.shape[2:]), jnp.float32)
    kind = Kind(reverse=reverse, output=False)
    local = _run_one(fused, kind, operands._replace(start=nothing, x=None), gates, plan).end
    log_whole = gating.log_wholes(gates)
    log_whole = jnp.pad(log_whole, ((0, 0), (0, 0), (0, segments * plan.segment - chunks)))
    log_segment = jnp.sum(log_whole.reshape(*log_whole.shape[:2], segments, plan.segment), axis=-1)
    if reverse:
        local, log_segment = jnp.flip(local, 2), jnp.flip(log_segment, 2)
    decays = chunk_decays(log_segment[:, :, None], None)
    after = jnp.einsum("bhst,bhtkv->bhskv", decays.between[:, :, 0], local, precision=jax.lax.Precision.HIGHEST)
    after = after + decays.from_entry[:, :, 0, :, None, None] * carried[:, :, None]
    starts = jnp.concatenate([carried[:, :, None], after[:, :, :-1]], axis=2)
    return jnp.flip(starts, 2) if reverse else starts


def _forward(inputs: Inputs, initial, fused: Fused, keep: bool):
    """y, the final state and, with keep, the states before every ANCHOR-th chunk."""
    num_tokens = inputs.q.shape[1]
    gates = gating.prepare(inputs.log_decay, inputs.eta, inputs.reset)
    q, k, v = (pad_tokens(x, CHUNK) for x in inputs[:3])
    plan = _plan(fused, inputs, gates)
    operands = Operands(q, k, v, initial[:, :, None], None)
    operands = operands._replace(start=_segment_starts(fused, operands, initial, gates, plan, reverse=False))
    swept = _run_one(fused, Kind(collect="states" if keep else ""), operands, gates, plan)
    return swept.out[:, :num_tokens], swept.end[:, :, -1], swept.collected


def _plan(fused: Fused, inputs: Inputs, gates: Gates) -> Plan:
    batch, _, heads, key_width = inputs.q.shape
    return fused.plan(
        batch, gates.eta.shape[2], heads, key_width, inputs.v.shape[-1], jnp.dtype(inputs.q.dtype).itemsize
    )


def _backward(inputs: Inputs, initial, entries, dy, dfinal, fused: Fused):
    """Cotangents of the inputs and of the initial state."""
    num_tokens = inputs.q.shape[1]
    gates = gating.prepare(inputs.log_decay, inputs.eta, inputs.reset)
    q, k, v, dy = (pad_tokens(x, CHUNK) for x in (inputs.q, inputs.k, inputs.v, dy.astype(inputs.v.dtype)))
    plan = _plan(fused, inputs, gates)
    if plan.segment < gates.eta.shape[2]:
        starts = entries[:, :, :: plan.segment // ANCHOR].astype(jnp.float32)
        ends = _segment_starts(fused, Operands(k, q, dy, entries, None), dfinal, gates, plan, reverse=True)
    else:
        starts, ends = initial[:, :, None], dfinal[:, :, None]
    kinds = (Kind(collect="paths"), Kind(reverse=True, collect="rows"), Kind(reverse=True, collect="anchors"))
    operands = (
        Operands(dy, v, k, _transpose(starts), q),
        Operands(v, dy, q, _transpose(ends), k),
        Operands(k, q, dy, ends, entries),
    )
    of_q, of_k, of_v = fused.backend(kinds, operands, gates, plan)
    inside, read = jnp.sum(of_q.collected, axis=1)
    stored, deta = jnp.sum(of_k.collected, axis=1)
    anchors = jnp.sum(of_v.collected, axis=(0, -1))
    dlog_decay = gating.decay_cotangent(inside, read, stored, anchors, gates, num_tokens, inputs.v.dtype)
    deta = jnp.moveaxis(deta.reshape(*deta.shape[:2], -1), 2, 1)[:, :num_tokens]
    dq, dk, dv = (swept.out[:, :num_tokens] for swept in (of_q, of_k, of_v))
    return Inputs(dq, dk, dv, dlog_decay, deta, None), of_v.end[:, :, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(inputs: Inputs, initial, fused: Fused):
    y, final, _ = over_rows(functools.partial(_forward, fused=fused, keep=False))(inputs, initial)
    return y, final


def _scan_fwd(inputs: Inputs, initial, fused: Fused):
    y, final, entries = over_rows(functools.partial(_forward, fused=fused, keep=True))(inputs, initial)
    return (y, final), (inputs, initial, entries)


def _scan_bwd(fused: Fused, residuals, cotangents):
    return over_rows(functools.partial(_backward, fused=fused))(*residuals, *cotangents)


_scan.defvjp(_scan_fwd, _scan_bwd)


def scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
    *,
    fused: Fused,
) -> tuple[jax.Array, jax.Array]:
    """The Hebbian scan by sweeps of one implementation; arguments and result as naive.scan, hand-written gradients."""
    inputs = Inputs(q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN)
    return cast(tuple[jax.Array, jax.Array], _scan(inputs, initial_state_BxHxKxV, fused))

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
by one small
product, and all segments then run side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from pallas_kernels.chunking import pad_tokens
from pallas_kernels.hebbian import gates as gating
from pallas_kernels.hebbian.decays import chunk_decays
from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a backend runs a sweep: values per program, loads in flight, chunks per segment (all chunks: one), and warps
    per program where the backend lets them be chosen.
    """

    values: int
    stages: int
    segment: int
    warps: int = 4


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
    stored and eta's cotangent; "anchors" (P, B, H, A); to be summed over the P blocks of values.
    """

    out: jax.Array | None
    end: jax.Array
    collected: jax.Array | None


# Runs several sweeps over the same tokens, in one launch where it can.
Backend = Callable[[tuple[Kind, ...], tuple[Operands, ...], Gates, Plan], tuple[Swept, ...]]
# Chooses the plan from (B, M, H, K, V, bytes of an element).
Planner = Callable[[int, int, int, int, int, int], Plan]


@dataclasses.dataclass(frozen=True)
class Fused:
    """One implementation of the fused form: its backend, its planner, and the widths that its kernels take."""

    backend: Backend
    plan: Planner
    width: Callable[[int], int]


class _Inputs(NamedTuple):
    """q, k (B, N, H, K), v (B, N, H, V), log_decay, eta (B, N, H), reset (B, N) or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    eta: jax.Array
    reset: jax.Array | None


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


def _forward(inputs: _Inputs, initial, fused: Fused, keep: bool):
    """y, the final state and, with keep, the states before every ANCHOR-th chunk."""
    num_tokens = inputs.q.shape[1]
    gates = gating.prepare(inputs.log_decay, inputs.eta, inputs.reset)
    q, k, v = (pad_tokens(x, CHUNK) for x in inputs[:3])
    plan = _plan(fused, inputs, gates)
    operands = Operands(q, k, v, initial[:, :, None], None)
    operands = operands._replace(start=_segment_starts(fused, operands, initial, gates, plan, reverse=False))
    swept = _run_one(fused, Kind(collect="states" if keep else ""), operands, gates, plan)
    assert swept.out is not None
    return swept.out[:, :num_tokens], swept.end[:, :, -1], swept.collected


def _plan(fused: Fused, inputs: _Inputs, gates: Gates) -> Plan:
    batch, _, heads, key_width = inputs.q.shape
    return fused.plan(
        batch, gates.eta.shape[2], heads, key_width, inputs.v.shape[-1], jnp.dtype(inputs.q.dtype).itemsize
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(inputs: _Inputs, initial, fused: Fused):
    y, final, _ = _forward(inputs, initial, fused, keep=False)
    return y, final


def _scan_fwd(inputs: _Inputs, initial, fused: Fused):
    y, final, entries = _forward(inputs, initial, fused, keep=True)
    return (y, final), (inputs, initial, entries)


def _scan_bwd(fused: Fused, residuals, cotangents):
    inputs, initial, entries = residuals
    num_tokens = inputs.q.shape[1]
    gates = gating.prepare(inputs.log_decay, inputs.eta, inputs.reset)
    q, k, v, dy = (pad_tokens(x, CHUNK) for x in (inputs.q, inputs.k, inputs.v, cotangents[0].astype(inputs.v.dtype)))
    dfinal = cotangents[1]
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
    assert of_q.collected is not None
    assert of_k.collected is not None
    assert of_v.collected is not None
    inside, read = jnp.sum(of_q.collected, axis=1)
    stored, deta = jnp.sum(of_k.collected, axis=1)
    anchors = jnp.sum(of_v.collected, axis=0)
    dlog_decay = gating.decay_cotangent(inside, read, stored, anchors, gates, num_tokens, inputs.v.dtype)
    if inputs.reset is not None:
        dlog_decay = jnp.where(inputs.reset[..., None], 0, dlog_decay)
    deta = jnp.moveaxis(deta.reshape(*deta.shape[:2], -1), 2, 1)[:, :num_tokens]
    dq, dk, dv = (swept.out[:, :num_tokens] for swept in (of_q, of_k, of_v) if swept.out is not None)
    return _Inputs(dq, dk, dv, dlog_decay, deta, None), of_v.end[:, :, 0]


_scan.defvjp(_scan_fwd, _scan_bwd)


def _widen(x: jax.Array, widths: tuple[int, ...]) -> jax.Array:
    """x with its last axes padded by zeros to widths."""
    missing = [wide - size for wide, size in zip(widths, x.shape[-len(widths) :], strict=True)]
    if not any(missing):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(widths)) + [(0, m) for m in missing])


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
    keys, values = initial_state_BxHxKxV.shape[-2:]
    wide_keys, wide_values = fused.width(keys), fused.width(values)
    inputs = _Inputs(
        _widen(q_BxNxHxK, (wide_keys,)),
        _widen(k_BxNxHxK, (wide_keys,)),
        _widen(v_BxNxHxV, (wide_values,)),
        log_decay_BxNxH,
        eta_BxNxH,
        reset_BxN,
    )
    start = _widen(initial_state_BxHxKxV, (wide_keys, wide_values))
    y, final = cast(tuple[jax.Array, jax.Array], _scan(inputs, start, fused))
    return y[..., :values], final[..., :keys, :values]

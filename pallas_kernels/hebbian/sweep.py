"""The fused form of the Hebbian scan: its state stays in registers through all chunks of a sequence.

Besides inputs and results only a state in every ANCHOR-th chunk is written and read. In a chunk, D_ij is the decay from
position j to i, e from the entry to i, f from j to the exit:
    y_i = sum_j D_ij eta_j (q_i . k_j) v_j + e_i W^T q_i,          W <- D_whole W + sum_j f_j eta_j k_j v_j^T
in order of time. The backward carries the cotangent G of the state against time,
    dv_j = eta_j (sum_i D_ij (q_i . k_j) dy_i + f_j G^T k_j),
    dk_j = eta_j (sum_i D_ij (v_j . dy_i) q_i + f_j G v_j),        G <- D_whole G + sum_i e_i q_i dy_i^T
and then in order of time, in many short walks from states that the forward left,
    dq_i = sum_j D_ij eta_j (dy_i . v_j) k_j + e_i W dy_i.
On their way they collect what the decays' cotangent is made of (`gates.Paths`).

Where there are too few streams (batch x heads x blocks of values) to fill the device, the sequence is cut into
segments: a first sweep that only carries the state finds what each segment adds to it, the states between them follow
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
from pallas_kernels.hebbian.gates import ANCHOR, CHUNK, Gates, Paths
from pallas_kernels.hebbian.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a backend runs a kernel.

    values: values of a forward program; stages: loads in flight; segment: chunks of a program that carries a state (all
    chunks: one segment); split: chunks of a program that computes dq, a multiple of ANCHOR.
    ahead: the forward computes scores a chunk ahead (mosaic). carry: values and stages of programs that only carry the
    state, if others.
    """

    values: int
    stages: int
    segment: int
    split: int = ANCHOR
    ahead: bool = False
    carry: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a forward kernel does: reverse, against time (eta is then not part of the writes); states, keep the state
    before every ANCHOR-th chunk; output False, only carry the state.
    """

    reverse: bool = False
    states: bool = False
    output: bool = True


class Operands(NamedTuple):
    """a (read with), b (written under) (B, N, H, K), c (written) (B, N, H, V); start (B, H, S, K, V) float32, the state
    before every segment (after it, in reverse).
    """

    a: jax.Array
    b: jax.Array
    c: jax.Array
    start: jax.Array


class Swept(NamedTuple):
    """out (B, N, H, V) as c, or None; end (B, H, S, K, V) float32; states (B, H, A, K, V) in c's dtype, or None."""

    out: jax.Array | None
    end: jax.Array
    states: jax.Array | None


class Pulled(NamedTuple):
    """What a backward kernel reads: q, k (B, N, H, K), v, dy (B, N, H, V), entries (B, H, A, K, V) in v's dtype, the
    state before every ANCHOR-th chunk, and end (B, H, S, K, V) float32, the state's cotangent after every segment.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    dy: jax.Array
    entries: jax.Array
    end: jax.Array


class Cotangents(NamedTuple):
    """What it leaves: dq, dk, dv as q, k, v; start (B, H, S, K, V) float32, the state's cotangent before every segment;
    and the parts of the gates' cotangents.
    """

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    start: jax.Array
    paths: Paths


def swept_types(kind: Kind, operands: Operands, gates: Gates) -> Swept:
    """Shapes and dtypes of what a forward kernel leaves."""
    batch, heads, chunks, _ = gates.eta.shape
    c, start = operands.c, operands.start
    states = (batch, heads, -(-chunks // ANCHOR), *start.shape[3:])
    found = (
        jax.ShapeDtypeStruct(c.shape, c.dtype) if kind.output else None,
        jax.ShapeDtypeStruct(start.shape, jnp.float32),
        jax.ShapeDtypeStruct(states, c.dtype) if kind.states else None,
    )
    return cast(Swept, Swept._make(cast(tuple[jax.Array, ...], found)))


def cotangent_types(pulled: Pulled, gates: Gates, dq: int, stored: int, anchors: int) -> Cotangents:
    """Shapes and dtypes of what a backward kernel leaves, paths in so many parts: those that come with dq, those of
    what is stored, and those at anchors.
    """
    single = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens = gates.eta.shape
    shapes = *[(dq, *tokens)] * 2, *[(stored, *tokens)] * 2, (anchors, *pulled.entries.shape[:-1])
    alike = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (pulled.q, pulled.k, pulled.v))
    found = *alike, single(pulled.end.shape), Paths._make(cast(tuple[jax.Array, ...], map(single, shapes)))
    return Cotangents._make(cast(tuple[Any, ...], found))


def segment_chunks(chunks: int, programs: int, enough: int = 64, wanted: int = 256) -> int:
    """Chunks per segment, where the sequence as a whole would run in so many programs.

    A cut costs a sweep: enough programs are left alone, fewer are cut for about as many as wanted. The defaults are
    what was measured on a device of 132 multiprocessors, each of which holds two programs.
    """
    segments = 1 if programs >= enough else min(wanted // programs, -(-chunks // ANCHOR))
    length = -(-chunks // segments)
    return min(chunks, -(-length // ANCHOR) * ANCHOR)


def join_segments(local: jax.Array, carried: jax.Array, gates: Gates, segment: int, reverse: bool) -> jax.Array:
    """The state that enters every segment of so many chunks, from what each adds to an empty one; local and the result
    are (B, H, S, K, V). carried (B, H, K, V) enters the first (reverse: the last).
    """
    chunks, segments = gates.eta.shape[2], local.shape[2]
    log_whole = gating.log_wholes(gates)
    log_whole = jnp.pad(log_whole, ((0, 0), (0, 0), (0, segments * segment - chunks)))
    log_segment = jnp.sum(log_whole.reshape(*log_whole.shape[:2], segments, segment), axis=-1)
    if reverse:
        local, log_segment = jnp.flip(local, 2), jnp.flip(log_segment, 2)
    decays = chunk_decays(log_segment[:, :, None], None)
    after = jnp.einsum("bhst,bhtkv->bhskv", decays.between[:, :, 0], local, precision=jax.lax.Precision.HIGHEST)
    after = after + decays.from_entry[:, :, 0, :, None, None] * carried[:, :, None]
    starts = jnp.concatenate([carried[:, :, None], after[:, :, :-1]], axis=2)
    return jnp.flip(starts, 2) if reverse else starts


@dataclasses.dataclass(frozen=True)
class Fused:
    """One implementation of the fused form, and its plans by (B, M, H, width, bytes of an element).

    widths: of K and V alike, to the next of which narrower ones are padded; empty if any will do. prepare, collect: as
    those of `gates`; join: as join_segments.
    """

    forward: Callable[[Kind, Operands, Gates, Plan], Swept]
    backward: Callable[[Pulled, Gates, Plan], Cotangents]
    forward_plan: Callable[[int, int, int, int, int], Plan]
    backward_plan: Callable[[int, int, int, int, int], Plan]
    widths: tuple[int, ...] = ()
    prepare: Callable[[jax.Array, jax.Array, jax.Array | None], Gates] = gating.prepare
    collect: Callable[[Paths, Gates, int, Any], tuple[jax.Array, jax.Array]] = gating.collect
    join: Callable[[jax.Array, jax.Array, Gates, int, bool], jax.Array] = join_segments


def _segment_starts(fused: Fused, operands: Operands, carried: jax.Array, gates: Gates, plan: Plan, reverse: bool):
    """The state (B, H, S, K, V) that enters every segment; carried enters the first (reverse: the last)."""
    segments = -(-gates.eta.shape[2] // plan.segment)
    if segments == 1:
        return carried[:, :, None]
    nothing = jnp.zeros((*carried.shape[:2], segments, *carried.shape[2:]), jnp.float32)
    kind = Kind(reverse=reverse, output=False)
    segment = plan.segment
    if plan.carry is not None:
        plan = dataclasses.replace(plan, values=plan.carry[0], stages=plan.carry[1])
    local = fused.forward(kind, operands._replace(start=nothing), gates, plan).end
    return fused.join(local, carried, gates, segment, reverse)


def _sizes(inputs: Inputs, gates: Gates) -> tuple[int, int, int, int, int]:
    batch, _, heads, width = inputs.q.shape
    return batch, gates.eta.shape[2], heads, max(width, inputs.v.shape[-1]), jnp.dtype(inputs.q.dtype).itemsize


def _forward(inputs: Inputs, initial, fused: Fused, keep: bool):
    """y, the final state and, with keep, the states before every ANCHOR-th chunk."""
    num_tokens = inputs.q.shape[1]
    gates = fused.prepare(inputs.log_decay, inputs.eta, inputs.reset)
    q, k, v = (pad_tokens(x, CHUNK) for x in inputs[:3])
    plan = fused.forward_plan(*_sizes(inputs, gates))
    operands = Operands(q, k, v, initial)
    operands = operands._replace(start=_segment_starts(fused, operands, initial, gates, plan, reverse=False))
    swept = fused.forward(Kind(states=keep), operands, gates, plan)
    assert swept.out is not None
    return swept.out[:, :num_tokens], swept.end[:, :, -1], swept.states


def _backward(inputs: Inputs, entries, dy, dfinal, fused: Fused):
    """Cotangents of the inputs and of the initial state."""
    num_tokens = inputs.q.shape[1]
    gates = fused.prepare(inputs.log_decay, inputs.eta, inputs.reset)
    q, k, v, dy = (pad_tokens(x, CHUNK) for x in (inputs.q, inputs.k, inputs.v, dy.astype(inputs.v.dtype)))
    plan = fused.backward_plan(*_sizes(inputs, gates))
    end = _segment_starts(fused, Operands(k, q, dy, dfinal), dfinal, gates, plan, reverse=True)
    found = fused.backward(Pulled(q, k, v, dy, entries, end), gates, plan)
    dlog_decay, deta = fused.collect(found.paths, gates, num_tokens, inputs.v.dtype)
    dq, dk, dv = (x[:, :num_tokens] for x in (found.dq, found.dk, found.dv))
    return Inputs(dq, dk, dv, dlog_decay, deta, None), found.start[:, :, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(inputs: Inputs, initial, fused: Fused):
    y, final, _ = over_rows(functools.partial(_forward, fused=fused, keep=False))(inputs, initial)
    return y, final


def _scan_fwd(inputs: Inputs, initial, fused: Fused):
    y, final, entries = over_rows(functools.partial(_forward, fused=fused, keep=True))(inputs, initial)
    return (y, final), (inputs, entries)


def _scan_bwd(fused: Fused, residuals, cotangents):
    return over_rows(functools.partial(_backward, fused=fused))(*residuals, *cotangents)


_scan.defvjp(_scan_fwd, _scan_bwd)


def _widen(x: jax.Array, *widths: int) -> jax.Array:
    """Zeros at the end of the last axes."""
    missing = [(0, width - size) for width, size in zip(widths, x.shape[-len(widths) :], strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(widths)) + missing) if any(size for _, size in missing) else x


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
    """The Hebbian scan by one implementation of the fused form; arguments and result as naive.scan, hand-written
    gradients.
    """
    keys, values = initial_state_BxHxKxV.shape[-2:]
    wide = min((width for width in fused.widths if width >= max(keys, values)), default=None)
    inputs = Inputs(q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN)
    initial = initial_state_BxHxKxV
    if wide is not None:
        inputs = inputs._replace(q=_widen(inputs.q, wide), k=_widen(inputs.k, wide), v=_widen(inputs.v, wide))
        initial = _widen(initial, wide, wide)
    y, final = cast(tuple[jax.Array, jax.Array], _scan(inputs, initial, fused))
    return y[..., :values], final[..., :keys, :values]

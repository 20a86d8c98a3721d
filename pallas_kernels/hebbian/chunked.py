"""Chunked form of the Hebbian scan for any device: dense products inside chunks, a scan of states between them.

Per chunk with entry state S, D_ij the decay from position j to i, e_i from entry to i, f_j from j to the exit:
    y_i   = e_i q_i S + sum_{j<=i} D_ij (q_i . k_j) eta_j v_j
    S_out = e_last S + sum_j f_j eta_j k_j v_j^T
The backward is written by hand: the same products transposed, and a reverse scan for the cotangents of the states (Yang
et al. 2024, "Gated Linear Attention"; Dao and Gu 2024, "Transformers are SSMs").

Chunks are computed side by side in segments and the segments one after the other. That bounds the memory (kept for the
backward: the inputs and one state per segment) and, on a CPU, keeps the working set in the caches: without it eight
times the tokens took twenty times as long.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.chunking import join_chunks, pad_tokens, split_chunks
from pallas_kernels.hebbian import narrow
from pallas_kernels.hebbian.decays import ChunkDecays, chunk_decays, decayed, log_decay_cotangent
from pallas_kernels.hebbian.inputs import Inputs

# Rows (tokens x heads x batch) of a segment: the caches of a CPU, enough parallel work and bounded memory elsewhere.
_ROWS_CPU = 4096
_ROWS_ELSEWHERE = 2**20


class _Plan(NamedTuple):
    """Tokens per chunk and chunks per segment."""

    chunk: int
    chunks: int


class _Chunks(NamedTuple):
    """One segment cut into M chunks of C tokens: q, k (B, H, M, C, K), v (B, H, M, C, V), eta (B, H, M, C)."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    eta: jax.Array
    decays: ChunkDecays


def _cut(inputs: Inputs, chunk: int) -> _Chunks:
    q, k, v, log_decay, eta = (split_chunks(x, chunk) for x in inputs[:5])
    reset = inputs.reset
    reset_BxMxC = None if reset is None else reset.reshape(reset.shape[0], -1, chunk)
    return _Chunks(q, k, v, eta, chunk_decays(log_decay, reset_BxMxC))


def _product(spec: str, a: jax.Array, b: jax.Array, operand, result) -> jax.Array:
    """einsum with operands rounded to `operand` and sums in `result`; full precision for float32 and wider."""
    return jnp.einsum(
        spec, a.astype(operand), b.astype(operand), precision=jax.lax.Precision.HIGHEST, preferred_element_type=result
    )


def _products(inputs: Inputs, state: jax.Array):
    """_product with bfloat16 operands for bfloat16 inputs; float16 has too short a range for products with states."""
    common = jnp.result_type(inputs.q, inputs.k, inputs.v)
    return functools.partial(_product, operand=common if common == jnp.bfloat16 else state.dtype, result=state.dtype)


def _carry(added_BxHxMxKxV, start_BxHxKxV, decays: ChunkDecays, reverse: bool):
    """Scan of the states over the chunks: the state before every chunk in the scan's direction, and the last one."""

    def body(state, xs):
        added, log_whole, survives = xs
        kept = decayed(log_whole[..., None, None], state)
        if survives is not None:
            kept = jnp.where(survives[:, None, None, None], kept, 0)
        return kept + added, state

    survives_MxB = None if decays.survives is None else decays.survives.T
    xs = (jnp.moveaxis(added_BxHxMxKxV, 2, 0), jnp.moveaxis(decays.log_whole, 2, 0), survives_MxB)
    last, before_MxBxHxKxV = jax.lax.scan(body, start_BxHxKxV, xs, reverse=reverse)
    return jnp.moveaxis(before_MxBxHxKxV, 0, 2), last


def _entry_states(chunks: _Chunks, state, product):
    weight = (chunks.decays.to_exit * chunks.eta)[..., None]
    written = product("bhmck,bhmcv->bhmkv", chunks.k * weight, chunks.v)
    return _carry(written, state, chunks.decays, reverse=False)


def _segment_forward(inputs: Inputs, state, chunk: int):
    """y of one segment and the state after it."""
    product = _products(inputs, state)
    chunks = _cut(inputs, chunk)
    entry, state = _entry_states(chunks, state, product)
    scores = product("bhmik,bhmjk->bhmij", chunks.q, chunks.k) * chunks.decays.between * chunks.eta[..., None, :]
    recalled = product("bhmik,bhmkv->bhmiv", chunks.q, entry)
    y = product("bhmij,bhmjv->bhmiv", scores, chunks.v) + chunks.decays.from_entry[..., None] * recalled
    return join_chunks(y).astype(inputs.v.dtype), state


def _segment_backward(inputs: Inputs, state, dy, dstate, chunk: int):
    """Cotangents of the inputs of one segment and of the state before it."""
    product = _products(inputs, state)
    chunks = _cut(inputs, chunk)
    decays, eta_j = chunks.decays, chunks.eta[..., None, :]
    dy = split_chunks(dy, chunk)
    from_entry = decays.from_entry[..., None]
    weight = (decays.to_exit * chunks.eta)[..., None]
    entry, _ = _entry_states(chunks, state, product)
    dexit, dstate = _carry(product("bhmck,bhmcv->bhmkv", chunks.q * from_entry, dy), dstate, decays, reverse=True)

    scores = product("bhmik,bhmjk->bhmij", chunks.q, chunks.k) * decays.between
    dscores = product("bhmiv,bhmjv->bhmij", dy, chunks.v)
    paths = scores * dscores
    scores, dscores = scores * eta_j, dscores * decays.between * eta_j

    dq_entry = from_entry * product("bhmiv,bhmkv->bhmik", dy, entry)
    dk_exit = product("bhmjv,bhmkv->bhmjk", chunks.v, dexit)
    dq = dq_entry + product("bhmij,bhmjk->bhmik", dscores, chunks.k)
    dk = weight * dk_exit + product("bhmij,bhmik->bhmjk", dscores, chunks.q)
    dv = weight * product("bhmjk,bhmkv->bhmjv", chunks.k, dexit) + product("bhmij,bhmiv->bhmjv", scores, dy)

    stored = decays.to_exit * jnp.sum(chunks.k.astype(state.dtype) * dk_exit, axis=-1)
    deta = jnp.sum(paths, axis=-2) + stored
    through = jnp.exp(decays.log_whole) * jnp.sum(entry * dexit, axis=(-2, -1))
    if decays.survives is not None:
        through = jnp.where(decays.survives[:, None], through, 0)
    read = jnp.sum(chunks.q.astype(state.dtype) * dq_entry, axis=-1)
    dlog_decay = log_decay_cotangent(paths * eta_j, read, stored * chunks.eta, through)
    gradients = (dq, dk, dv, dlog_decay, deta)
    return tuple(join_chunks(d).astype(x.dtype) for d, x in zip(gradients, inputs[:5], strict=True)), dstate


def _segments(x, plan: _Plan):
    """Pads every (B, N, ...) of a tree to whole segments; a padded token writes nothing and decays nothing."""
    return jax.tree.map(lambda a: pad_tokens(a, plan.chunk * plan.chunks), x)


def _take(x, plan: _Plan, index):
    """Segment number index of every (B, N, ...) of a tree."""
    tokens = plan.chunk * plan.chunks
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index * tokens, tokens, axis=1), x)


def _put(buffers, plan: _Plan, index, segment):
    """The buffers (B, N, ...) of a tree with segment number index filled in; a scan does this in place."""
    start = plan.chunk * plan.chunks * index
    return jax.tree.map(lambda a, x: jax.lax.dynamic_update_slice_in_dim(a, x, start, axis=1), buffers, segment)


def _forward(inputs: Inputs, initial_state, plan: _Plan):
    """y, final state, and the states before every segment (S, B, H, K, V)."""
    padded = _segments(inputs, plan)

    def body(carry, index):
        y, state = carry
        y_segment, after = _segment_forward(_take(padded, plan, index), state, plan.chunk)
        return (_put(y, plan, index, y_segment), after), state

    segments = jnp.arange(padded.q.shape[1] // (plan.chunk * plan.chunks))
    (y, final), entries = jax.lax.scan(body, (jnp.zeros_like(padded.v), initial_state), segments)
    return y[:, : inputs.q.shape[1]], final, entries


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scan(inputs: Inputs, initial_state, plan: _Plan):
    y, final, _ = _forward(inputs, initial_state, plan)
    return y, final


def _scan_fwd(inputs: Inputs, initial_state, plan: _Plan):
    y, final, entries = _forward(inputs, initial_state, plan)
    return (y, final), (inputs, entries)


def _scan_bwd(plan: _Plan, residuals, cotangents):
    inputs, entries = residuals
    dy, dfinal = cotangents
    padded = _segments((inputs, dy), plan)

    def body(carry, xs):
        gradients, dstate = carry
        index, state = xs
        segment, dy = _take(padded, plan, index)
        gradients_segment, dstate = _segment_backward(segment, state, dy, dstate, plan.chunk)
        return (_put(gradients, plan, index, gradients_segment), dstate), None

    buffers = jax.tree.map(jnp.zeros_like, padded[0][:5])
    segments = (jnp.arange(entries.shape[0]), entries)
    (gradients, dinitial), _ = jax.lax.scan(body, (buffers, dfinal), segments, reverse=True)
    dq, dk, dv, dlog_decay, deta = (d[:, : inputs.q.shape[1]] for d in gradients)
    return Inputs(dq, dk, dv, dlog_decay, deta, None), dinitial


_scan.defvjp(_scan_fwd, _scan_bwd)


def _make_plan(shape: tuple[int, ...], width: int, chunk: int | None, rows: int | None) -> _Plan:
    """Chunks and segments for (B, N, H), by measurement where the caller leaves them open (None)."""
    batch, num_tokens, heads = shape
    on_cpu = registry.default_device().platform == "cpu"
    if chunk is None:
        chunk = 128 if not on_cpu else 64 if width > 32 else 32
    if rows is None:
        rows = _ROWS_CPU if on_cpu else _ROWS_ELSEWHERE
    chunk = min(chunk, num_tokens)
    chunks = math.ceil(num_tokens / chunk)
    segments = math.ceil(chunks / max(1, rows // (batch * heads * chunk)))
    return _Plan(chunk, math.ceil(chunks / segments))


def scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
    *,
    chunk: int | None = None,
    rows: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The Hebbian scan in chunks; arguments and result as naive.scan, gradients by the hand-written backward.

    chunk is the tokens of a chunk, rows the tokens x heads x batch rows of a segment; None chooses by device and width.
    """
    inputs = Inputs(q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN)
    key_width, value_width = q_BxNxHxK.shape[-1], v_BxNxHxV.shape[-1]
    if key_width * value_width <= narrow.LARGEST_STATE:
        return narrow.scan(*inputs[:5], initial_state_BxHxKxV, reset_BxN)
    plan = _make_plan(q_BxNxHxK.shape[:3], max(key_width, value_width), chunk, rows)
    return _scan(inputs, initial_state_BxHxKxV, plan)

"""Chunked form of the Hebbian scan for any device: dense products inside chunks, a scan of states between them.

Per chunk with entry state S, D_ij the decay from position j to i, e_i from entry to i, f_j from j to the exit:
    y_i   = e_i q_i S + sum_{j<=i} D_ij (q_i . k_j) eta_j v_j
    S_out = e_last S + sum_j f_j eta_j k_j v_j^T
The backward is written by hand: the same products transposed, and a reverse scan for the cotangents of the states
(kernels like these are derived in Yang et al. 2024, "Gated Linear Attention", and Dao & Gu 2024, "Mamba-2").
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunking import pad_tokens
from pallas_kernels.hebbian.decays import ChunkDecays, chunk_decays, decayed

CHUNK = 64


class _Tokens(NamedTuple):
    """Inputs of a scan cut into M chunks of C tokens, heads before tokens."""

    q_BxHxMxCxK: jax.Array
    k_BxHxMxCxK: jax.Array
    v_BxHxMxCxV: jax.Array
    eta_BxHxMxC: jax.Array
    decays: ChunkDecays


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """(B, N, H, ...) to (B, H, M, C, ...), padded with zeros: a padded token writes nothing and decays nothing."""
    x = pad_tokens(x, chunk)
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(*x.shape[:2], x.shape[2] // chunk, chunk, *x.shape[3:])


def _join(x: jax.Array, num_tokens: int) -> jax.Array:
    """Inverse of _split."""
    x = x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])
    return jnp.moveaxis(x[:, :, :num_tokens], 1, 2)


def _cut(q, k, v, log_decay, eta, reset, chunk: int) -> _Tokens:
    reset_BxMxC = None
    if reset is not None:
        padded = pad_tokens(reset, chunk, False)
        reset_BxMxC = padded.reshape(padded.shape[0], -1, chunk)
    decays = chunk_decays(_split(log_decay, chunk), reset_BxMxC)
    return _Tokens(_split(q, chunk), _split(k, chunk), _split(v, chunk), _split(eta, chunk), decays)


def _product(spec: str, a: jax.Array, b: jax.Array, operand, result) -> jax.Array:
    """einsum with operands rounded to `operand` and sums in `result`; full precision for float32 and wider."""
    return jnp.einsum(
        spec, a.astype(operand), b.astype(operand), precision=jax.lax.Precision.HIGHEST, preferred_element_type=result
    )


def _operand_dtype(q, k, v, state):
    """bfloat16 inputs keep bfloat16 products; everything else, float16 with its short range too, uses the state's dtype."""
    inputs = jnp.result_type(q, k, v)
    return inputs if inputs == jnp.bfloat16 else state.dtype


def _carry_states(added_BxHxMxKxV, initial_BxHxKxV, decays: ChunkDecays, reverse: bool):
    """Scan of the states over the chunks: the state before every chunk in the scan's direction, and the last one."""

    def body(state, xs):
        added, log_whole, survives = xs
        kept = decayed(log_whole[..., None, None], state)
        if survives is not None:
            kept = jnp.where(survives[:, None, None, None], kept, 0)
        return kept + added, state

    survives_MxB = None if decays.survives_BxM is None else decays.survives_BxM.T
    xs = (jnp.moveaxis(added_BxHxMxKxV, 2, 0), jnp.moveaxis(decays.log_whole_BxHxM, 2, 0), survives_MxB)
    last, before_MxBxHxKxV = jax.lax.scan(body, initial_BxHxKxV, xs, reverse=reverse)
    return jnp.moveaxis(before_MxBxHxKxV, 0, 2), last


def _forward(q, k, v, log_decay, eta, initial_state, reset, chunk: int):
    """y, final state and the states at the chunks' entries."""
    num_tokens = q.shape[1]
    product = functools.partial(_product, operand=_operand_dtype(q, k, v, initial_state), result=initial_state.dtype)
    tokens = _cut(q, k, v, log_decay, eta, reset, chunk)
    decays = tokens.decays
    weight = (decays.to_exit_BxHxMxC * tokens.eta_BxHxMxC)[..., None]
    written = product("bhmck,bhmcv->bhmkv", tokens.k_BxHxMxCxK * weight, tokens.v_BxHxMxCxV)
    entry, final = _carry_states(written, initial_state, decays, reverse=False)
    scores = product("bhmik,bhmjk->bhmij", tokens.q_BxHxMxCxK, tokens.k_BxHxMxCxK)
    scores = scores * decays.between_BxHxMxCxC * tokens.eta_BxHxMxC[..., None, :]
    y = product("bhmij,bhmjv->bhmiv", scores, tokens.v_BxHxMxCxV)
    recalled = product("bhmik,bhmkv->bhmiv", tokens.q_BxHxMxCxK, entry)
    y = y + decays.from_entry_BxHxMxC[..., None] * recalled
    return _join(y, num_tokens).astype(v.dtype), final, entry


def _log_decay_cotangent(pairs, from_entry, to_exit, through) -> jax.Array:
    """Cotangent of the log decays from the products that each decay takes part in.

    pairs_ij: cotangent times value of the path from token j to readout i; from_entry_i: from the entry state to readout
    i; to_exit_j: from token j to the exit state; through: from entry to exit. The decay of token t lies on the paths with
    j < t <= i. They are summed as such: the usual short cut, differences of row and column sums, cancels.
    """
    chunk = pairs.shape[-1]
    at_or_after = jnp.triu(jnp.ones((chunk, chunk), pairs.dtype))
    strictly_before = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    precise = jax.lax.Precision.HIGHEST
    later = jnp.einsum("ti,bhmij->bhmtj", at_or_after, pairs, precision=precise)
    inside = jnp.sum(jnp.where(strictly_before, later, 0), axis=-1)
    read = jnp.einsum("ti,bhmi->bhmt", at_or_after, from_entry, precision=precise)
    stored = jnp.einsum("jt,bhmj->bhmt", at_or_after - jnp.eye(chunk, dtype=pairs.dtype), to_exit, precision=precise)
    return inside + read + stored + through[..., None]


def _backward(chunk: int, residuals, cotangents):
    q, k, v, log_decay, eta, reset, entry = residuals
    dy, dfinal = cotangents
    num_tokens, result = q.shape[1], entry.dtype
    product = functools.partial(_product, operand=_operand_dtype(q, k, v, entry), result=result)
    tokens = _cut(q, k, v, log_decay, eta, reset, chunk)
    qc, kc, vc, ec, decays = tokens
    dyc = _split(dy, chunk)
    from_entry = decays.from_entry_BxHxMxC[..., None]
    weight = (decays.to_exit_BxHxMxC * ec)[..., None]

    dstate = product("bhmck,bhmcv->bhmkv", qc * from_entry, dyc)
    dexit, dinitial = _carry_states(dstate, dfinal, decays, reverse=True)

    scores = product("bhmik,bhmjk->bhmij", qc, kc) * decays.between_BxHxMxCxC
    dscores = product("bhmiv,bhmjv->bhmij", dyc, vc)
    paths = scores * dscores
    dscores = dscores * decays.between_BxHxMxCxC * ec[..., None, :]
    scores = scores * ec[..., None, :]

    dq_entry = from_entry * product("bhmiv,bhmkv->bhmik", dyc, entry)
    dk_exit = product("bhmjv,bhmkv->bhmjk", vc, dexit)
    dq = dq_entry + product("bhmij,bhmjk->bhmik", dscores, kc)
    dk = weight * dk_exit + product("bhmij,bhmik->bhmjk", dscores, qc)
    dv = weight * product("bhmjk,bhmkv->bhmjv", kc, dexit) + product("bhmij,bhmiv->bhmjv", scores, dyc)

    stored = decays.to_exit_BxHxMxC * jnp.sum(kc.astype(result) * dk_exit, axis=-1)
    deta = jnp.sum(paths, axis=-2) + stored
    through = jnp.exp(decays.log_whole_BxHxM) * jnp.sum(entry * dexit, axis=(-2, -1))
    if decays.survives_BxM is not None:
        through = jnp.where(decays.survives_BxM[:, None], through, 0)
    read = jnp.sum(qc.astype(result) * dq_entry, axis=-1)
    dlog_decay = _log_decay_cotangent(paths * ec[..., None, :], read, stored * ec, through)

    def like(x, primal):
        return _join(x, num_tokens).astype(primal.dtype)

    return like(dq, q), like(dk, k), like(dv, v), like(dlog_decay, log_decay), like(deta, eta), dinitial, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _scan(q, k, v, log_decay, eta, initial_state, reset, chunk: int):
    y, final, _ = _forward(q, k, v, log_decay, eta, initial_state, reset, chunk)
    return y, final


def _scan_fwd(q, k, v, log_decay, eta, initial_state, reset, chunk: int):
    y, final, entry = _forward(q, k, v, log_decay, eta, initial_state, reset, chunk)
    return (y, final), (q, k, v, log_decay, eta, reset, entry)


_scan.defvjp(_scan_fwd, _backward)


def scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The Hebbian scan in chunks; arguments and result as naive.scan, gradients by the hand-written backward."""
    chunk = min(chunk, q_BxNxHxK.shape[1])
    return _scan(q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, initial_state_BxHxKxV, reset_BxN, chunk)

"""What the delta rule writes, in chunks: dense products and one triangular inverse inside, a walk of states between.

Per chunk with entry state W, D_ij the decay from position j to i, e_i from entry to i, f_j from j to the exit, the
corrected values u_i = v_i - e_i W^T k_i - sum_{j<i} D_ij (k_i . k_j) eta_j u_j solve a unit triangular system:
    A_ij = D_ij (k_i . k_j) eta_j for j < i,    T = (I + A)^-1
    U = T V - (T e K) W,    W <- e_last W + (f eta K)^T U
(Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule", and "Gated Delta Networks"). T and T e K do
not depend on the state, so all chunks find them side by side; the walk takes two products a chunk. The backward is
written by hand: it keeps the inputs, U and the state before every chunk, computes the rest anew, and walks back once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunking import join_chunks, pad_tokens, split_chunks
from pallas_kernels.delta.inverse import unit_lower_inverse
from pallas_kernels.hebbian.decays import ChunkDecays, chunk_decays, decayed, log_decay_cotangent

# Tokens of a chunk: the inverse costs C a token, the walk 1 / C.
CHUNK = 64


class Inputs(NamedTuple):
    """k (B, N, H, K), v (B, N, H, V), log_decay, eta (B, N, H), reset (B, N) or None."""

    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    eta: jax.Array
    reset: jax.Array | None


class _Chunks(NamedTuple):
    """M chunks of C tokens, all in the state's dtype: k (B, H, M, C, K), eta (B, H, M, C), and what follows from them.

    between (B, H, M, C, C): D_ij (k_i . k_j) for j < i, so A is that times eta_j; inverse: T. read (B, H, M, C, K):
    e K; solved_read: T e K; written: f eta K.
    """

    k: jax.Array
    eta: jax.Array
    decays: ChunkDecays
    between: jax.Array
    inverse: jax.Array
    read: jax.Array
    solved_read: jax.Array
    written: jax.Array


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


def _cut(inputs: Inputs, chunk: int, dtype) -> _Chunks:
    k, log_decay, eta = (split_chunks(x, chunk) for x in (inputs.k, inputs.log_decay, inputs.eta))
    reset = inputs.reset
    decays = chunk_decays(log_decay, None if reset is None else reset.reshape(reset.shape[0], -1, chunk))
    # Products of half precision numbers are exact in float32: there is no need to widen these operands.
    overlaps = jnp.einsum("bhmik,bhmjk->bhmij", k, k, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)
    earlier = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    between = jnp.where(earlier, decays.between * overlaps, 0)
    inverse = unit_lower_inverse(between * eta[..., None, :])
    k = k.astype(dtype)
    read = decays.from_entry[..., None] * k
    written = (decays.to_exit * eta)[..., None] * k
    solved_read = _product("bhmij,bhmjk->bhmik", inverse, read)
    return _Chunks(k, eta, decays, between, inverse, read, solved_read, written)


def _kept(state: jax.Array, log_whole: jax.Array, survives: jax.Array | None) -> jax.Array:
    """What is left of a state (B, H, K, V), or of a cotangent of one, on the other side of its chunk."""
    kept = decayed(log_whole[..., None, None], state)
    return kept if survives is None else jnp.where(survives[:, None, None, None], kept, 0)


def _chunks_first(decays: ChunkDecays, *arrays: jax.Array):
    """Arrays (B, H, M, ...) and the decays of whole chunks as the steps of a walk."""
    survives_MxB = None if decays.survives is None else decays.survives.T
    return *(jnp.moveaxis(x, 2, 0) for x in (*arrays, decays.log_whole)), survives_MxB


def _forward(inputs: Inputs, initial_state: jax.Array, chunk: int):
    """u (B, N, H, V) and the states before every chunk (B, H, M, K, V)."""
    padded = _padded(inputs, chunk)
    chunks = _cut(padded, chunk, initial_state.dtype)
    v = split_chunks(padded.v, chunk)
    solved_v = _product("bhmij,bhmjv->bhmiv", chunks.inverse, v.astype(initial_state.dtype))

    def body(state, xs):
        solved_v_m, solved_read, written, log_whole, survives = xs
        # Rounded before it is written: later corrections then see what the Hebbian memory holds, and make good for it.
        u = (solved_v_m - _product("bhik,bhkv->bhiv", solved_read, state)).astype(v.dtype)
        added = _product("bhik,bhiv->bhkv", written, u.astype(state.dtype))
        return _kept(state, log_whole, survives) + added, (u, state)

    steps = _chunks_first(chunks.decays, solved_v, chunks.solved_read, chunks.written)
    _, (u, entries) = jax.lax.scan(body, initial_state, steps)
    return join_chunks(jnp.moveaxis(u, 0, 2))[:, : inputs.v.shape[1]], jnp.moveaxis(entries, 0, 2)


def _padded(x, chunk: int):
    """Every (B, N, ...) of a tree in whole chunks; a padded token writes nothing and decays nothing."""
    return jax.tree.map(lambda a: pad_tokens(a, chunk), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _corrected(inputs: Inputs, initial_state: jax.Array, chunk: int):
    return _forward(inputs, initial_state, chunk)


def _corrected_fwd(inputs: Inputs, initial_state: jax.Array, chunk: int):
    u, entries = _forward(inputs, initial_state, chunk)
    return (u, entries), (inputs, u, entries)


def _walk_back(chunks: _Chunks, du: jax.Array, dentries: jax.Array):
    """Cotangents of the states after every chunk (B, H, M, K, V), and of the one before the first."""

    def body(dexit, xs):
        du_m, dentry, solved_read, written, log_whole, survives = xs
        du_m = du_m + _product("bhik,bhkv->bhiv", written, dexit)
        dread = _product("bhik,bhiv->bhkv", solved_read, du_m)
        return _kept(dexit, log_whole, survives) - dread + dentry, dexit

    steps = _chunks_first(chunks.decays, du, dentries, chunks.solved_read, chunks.written)
    dinitial, dexits = jax.lax.scan(body, jnp.zeros_like(dentries[:, :, 0]), steps, reverse=True)
    return jnp.moveaxis(dexits, 0, 2), dinitial


def _corrected_bwd(chunk: int, residuals, cotangents):
    inputs, u, entries = residuals
    dtype = entries.dtype
    padded, u, du = _padded((inputs, u, cotangents[0]), chunk)
    u, du = (split_chunks(x, chunk).astype(dtype) for x in (u, du))
    chunks = _cut(padded, chunk, dtype)
    decays = chunks.decays
    dexits, dinitial = _walk_back(chunks, du, cotangents[1])

    du = du + _product("bhmik,bhmkv->bhmiv", chunks.written, dexits)
    dv = _product("bhmji,bhmjv->bhmiv", chunks.inverse, du)
    dread = -_product("bhmiv,bhmkv->bhmik", dv, entries)
    dwritten = _product("bhmiv,bhmkv->bhmik", u, dexits)
    dbetween = -_product("bhmiv,bhmjv->bhmij", dv, u)
    paths = chunks.between * dbetween
    eta_j = chunks.eta[..., None, :]
    earlier = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    doverlaps = jnp.where(earlier, dbetween * decays.between * eta_j, 0)
    dk = _product("bhmij,bhmjk->bhmik", doverlaps + jnp.swapaxes(doverlaps, -1, -2), chunks.k)
    dk = dk + decays.from_entry[..., None] * dread + (decays.to_exit * chunks.eta)[..., None] * dwritten

    stored = decays.to_exit * jnp.sum(chunks.k * dwritten, axis=-1)
    deta = jnp.sum(paths, axis=-2) + stored
    through = jnp.exp(decays.log_whole) * jnp.sum(entries * dexits, axis=(-2, -1))
    if decays.survives is not None:
        through = jnp.where(decays.survives[:, None], through, 0)
    read = jnp.sum(chunks.read * dread, axis=-1)
    dlog_decay = log_decay_cotangent(paths * eta_j, read, stored * chunks.eta, through)
    dk, dv, dlog_decay, deta = (
        join_chunks(d)[:, : x.shape[1]].astype(x.dtype)
        for d, x in zip((dk, dv, dlog_decay, deta), inputs[:4], strict=True)
    )
    return Inputs(dk, dv, dlog_decay, deta, None), dinitial


_corrected.defvjp(_corrected_fwd, _corrected_bwd)


def corrected_values(
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """u (B, N, H, V) in v's dtype with which the Hebbian memory is the error-correcting one, u as in naive.scan.

    Also the states before every chunk (B, H, M, K, V) in initial_state's dtype. chunk, a power of two, is the tokens of
    a chunk where there are as many. Gradients reach every floating argument, through both results.
    """
    inputs = Inputs(k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN)
    shortest = 1 << (k_BxNxHxK.shape[1] - 1).bit_length()
    return _corrected(inputs, initial_state_BxHxKxV, min(chunk, shortest))

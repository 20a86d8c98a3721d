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
from pallas_kernels.delta.walk import Steps, Walk, plain
from pallas_kernels.hebbian.decays import ChunkDecays, chunk_decays, log_decay_cotangent
from pallas_kernels.products import product

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
    solved_read = product("bhmij,bhmjk->bhmik", inverse, read)
    return _Chunks(k, eta, decays, between, inverse, read, solved_read, written)


def _forward(inputs: Inputs, initial_state: jax.Array, chunk: int, walk: Walk):
    """u (B, N, H, V) and the states before every chunk (B, H, M, K, V)."""
    padded = _padded(inputs, chunk)
    chunks = _cut(padded, chunk, initial_state.dtype)
    v = split_chunks(padded.v, chunk)
    solved_v = product("bhmij,bhmjv->bhmiv", chunks.inverse, v.astype(initial_state.dtype))
    steps = Steps(solved_v, chunks.solved_read, chunks.written, chunks.decays.log_whole, chunks.decays.survives)
    # Rounded before it is written: later corrections then see what the Hebbian memory holds, and make good for it.
    u, entries, _ = walk(steps, initial_state, v.dtype)
    return join_chunks(u)[:, : inputs.v.shape[1]], entries


def _padded(x, chunk: int):
    """Every (B, N, ...) of a tree in whole chunks; a padded token writes nothing and decays nothing."""
    return jax.tree.map(lambda a: pad_tokens(a, chunk), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _corrected(inputs: Inputs, initial_state: jax.Array, chunk: int, walk: Walk):
    return _forward(inputs, initial_state, chunk, walk)


def _corrected_fwd(inputs: Inputs, initial_state: jax.Array, chunk: int, walk: Walk):
    u, entries = _forward(inputs, initial_state, chunk, walk)
    return (u, entries), (inputs, u, entries)


def _corrected_bwd(chunk: int, walk: Walk, residuals, cotangents):
    inputs, u, entries = residuals
    dtype = entries.dtype
    padded, u, du = _padded((inputs, u, cotangents[0]), chunk)
    u, du = (split_chunks(x, chunk).astype(dtype) for x in (u, du))
    chunks = _cut(padded, chunk, dtype)
    decays = chunks.decays
    steps = Steps(du, chunks.solved_read, chunks.written, decays.log_whole, decays.survives, cotangents[1])
    du, dexits, dinitial = walk(steps, jnp.zeros_like(entries[:, :, 0]), dtype)

    dv = product("bhmji,bhmjv->bhmiv", chunks.inverse, du)
    dread = -product("bhmiv,bhmkv->bhmik", dv, entries)
    dwritten = product("bhmiv,bhmkv->bhmik", u, dexits)
    dbetween = -product("bhmiv,bhmjv->bhmij", dv, u)
    paths = chunks.between * dbetween
    eta_j = chunks.eta[..., None, :]
    earlier = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    doverlaps = jnp.where(earlier, dbetween * decays.between * eta_j, 0)
    dk = product("bhmij,bhmjk->bhmik", doverlaps + jnp.swapaxes(doverlaps, -1, -2), chunks.k)
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
    walk: Walk = plain,
) -> tuple[jax.Array, jax.Array]:
    """u (B, N, H, V) in v's dtype with which the Hebbian memory is the error-correcting one, u as in naive.scan.

    Also the states before every chunk (B, H, M, K, V) in initial_state's dtype. chunk, a power of two, is the tokens of
    a chunk where there are as many; walk goes from chunk to chunk. Gradients reach every floating argument, through
    both results.
    """
    inputs = Inputs(k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN)
    shortest = 1 << (k_BxNxHxK.shape[1] - 1).bit_length()
    return _corrected(inputs, initial_state_BxHxKxV, min(chunk, shortest), walk)

"""Lyapunov monitor: does dissipation keep up with what is written?

Energy of a head is E = ‖W‖². The exact dynamics W_t = e^{-Γ_t dt} W_{t-1} + η k v^T give, over a chunk c of tokens
with accumulated decay Γ̄_c, the supply S_c = E_c − e^{−2Γ̄_c} E_{c−1}: the energy that writing added to what
dissipation left. Over an interval a head is *stable* iff

    E_end − E_start ≤ GROWTH_SHARE · Σ_c max(S_c, 0),

that is, at least nine tenths of what was supplied has been dissipated again. A memory that fills up is unstable by
this definition, one in its steady state is stable.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.chunking import walk
from pallas_kernels.hebbian.decays import chunk_decays

GROWTH_SHARE = 0.1
CHUNK = 64
# Chunks whose memories are computed at once, and held.
BLOCK = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LyapunovState:
    """What the monitor carries along a stream; every array is `(B, H)` float32."""

    chunk_energy_BxH: jax.Array
    chunk_decay_BxH: jax.Array
    interval_energy_BxH: jax.Array
    supply_BxH: jax.Array
    stable_BxH: jax.Array
    energy_change_BxH: jax.Array


def init_lyapunov_state(batch: int, num_heads: int, dtype: jnp.dtype = jnp.float32) -> LyapunovState:
    """Monitor of an empty memory: no energy, nothing supplied, stable."""
    # Separate buffers, because a training step donates them one by one.
    zeros = lambda: jnp.zeros((batch, num_heads), dtype)  # noqa: E731
    return LyapunovState(zeros(), zeros(), zeros(), zeros(), jnp.ones((batch, num_heads), dtype), zeros())


def opened(energy_BxH: jax.Array) -> LyapunovState:
    """Monitor at the start of an interval, of a memory with that energy; nothing supplied yet."""
    zeros_BxH = jnp.zeros_like(energy_BxH)
    return LyapunovState(energy_BxH, zeros_BxH, energy_BxH, zeros_BxH, jnp.ones_like(energy_BxH), zeros_BxH)


def energy(w_KxV: jax.Array) -> jax.Array:
    """E = ‖W‖² of every head: `(..., K, V)` to `(...)`."""
    return jnp.sum(jnp.square(w_KxV), axis=(-2, -1))


def chunk_length(interval: int) -> int:
    """Length in tokens of the monitor's chunks: they divide the consolidation interval (0 = no consolidation)."""
    if interval == 0:
        return CHUNK
    return max(d for d in range(1, min(CHUNK, interval) + 1) if interval % d == 0)


def observe(
    lyapunov: LyapunovState,
    w_BxHxKxV: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    reset_BxN: jax.Array,
    position: jax.Array,
    chunk: int,
) -> LyapunovState:
    """Follow the energy over N tokens that start from `w` at stream position `position`.

    Chunks end at stream positions that are multiples of `chunk`, however the stream is cut into calls, so the figures
    do not depend on the cutting. A document's reset restarts the interval. Read-only: no gradient flows through any of
    it.
    """
    stop = jax.lax.stop_gradient
    w_BxHxKxV = stop(w_BxHxKxV)
    dtype = w_BxHxKxV.dtype
    num_tokens = k_BxNxHxK.shape[1]
    offset = position % chunk
    # Tokens are laid into whole chunks at the offset where the stream stands; the padding writes nothing and forgets
    # nothing.
    num_chunks = 1 if num_tokens == 1 else -(-num_tokens // chunk) + (chunk > 1)

    def in_chunks(x_BxN: jax.Array) -> jax.Array:
        if num_tokens == 1:
            return stop(x_BxN)[None]
        padded = jnp.zeros((x_BxN.shape[0], num_chunks * chunk, *x_BxN.shape[2:]), x_BxN.dtype)
        padded = jax.lax.dynamic_update_slice_in_dim(padded, stop(x_BxN), offset, axis=1)
        return jnp.moveaxis(padded.reshape(x_BxN.shape[0], num_chunks, chunk, *x_BxN.shape[2:]), 1, 0)

    reset_MxBxC = in_chunks(reset_BxN)
    resets_after_MxBxC = jnp.cumsum(reset_MxBxC[..., ::-1], axis=-1)[..., ::-1] - reset_MxBxC
    current_MxBxCx1 = (resets_after_MxBxC == 0)[..., None]
    kept_MxBxCxH = jnp.where(current_MxBxCx1, in_chunks(log_decay_BxNxH.astype(dtype)), 0)
    to_end_MxBxCxH = jnp.cumsum(kept_MxBxCxH[:, :, ::-1], axis=2)[:, :, ::-1] - kept_MxBxCxH
    strength_MxBxCxH = jnp.exp(jnp.minimum(to_end_MxBxCxH, 0)) * in_chunks(eta_BxNxH.astype(dtype))
    weight_MxBxCxH = jnp.where(current_MxBxCx1, strength_MxBxCxH, 0)
    log_decay_MxBxH, has_reset_MxB = jnp.sum(kept_MxBxCxH, axis=2), jnp.any(reset_MxBxC, axis=2)
    chunks = _Chunks(in_chunks(k_BxNxHxK), in_chunks(v_BxNxHxV), weight_MxBxCxH, log_decay_MxBxH, has_reset_MxB)
    energy_MxBxH = _energies(w_BxHxKxV, chunks)
    ends_M = (jnp.arange(num_chunks) + 1) * chunk <= offset + num_tokens

    def step(state: LyapunovState, chunk_end):
        energy_BxH, log_decay_BxH, has_reset_B, ends_here = chunk_end
        unbroken = lambda x_BxH: jnp.where(has_reset_B[:, None], 0, x_BxH)  # noqa: E731
        chunk_decay_BxH = unbroken(state.chunk_decay_BxH) - log_decay_BxH
        chunk_energy_BxH, supply_BxH = unbroken(state.chunk_energy_BxH), unbroken(state.supply_BxH)
        supplied_BxH = jnp.maximum(energy_BxH - jnp.exp(-2 * chunk_decay_BxH) * chunk_energy_BxH, 0)
        state = replace(
            state,
            chunk_energy_BxH=jnp.where(ends_here, energy_BxH, chunk_energy_BxH),
            chunk_decay_BxH=jnp.where(ends_here, 0, chunk_decay_BxH),
            interval_energy_BxH=unbroken(state.interval_energy_BxH),
            supply_BxH=jnp.where(ends_here, supply_BxH + supplied_BxH, supply_BxH),
        )
        return state, None

    return walk(step, jax.tree.map(stop, lyapunov), (energy_MxBxH, log_decay_MxBxH, has_reset_MxB, ends_M))[0]


class _Chunks(NamedTuple):
    """M chunks of C tokens; weight: what is left at the chunk's end of a token's write; log_decay: since its start or
    last reset.
    """

    k_MxBxCxHxK: jax.Array
    v_MxBxCxHxV: jax.Array
    weight_MxBxCxH: jax.Array
    log_decay_MxBxH: jax.Array
    has_reset_MxB: jax.Array


def _energies(w_BxHxKxV: jax.Array, chunks: _Chunks) -> jax.Array:
    """Energy at the end of every chunk `(M, B, H)` of a memory that is `w` before the first, block by block."""
    num_chunks = chunks.log_decay_MxBxH.shape[0]
    num_blocks = -(-num_chunks // BLOCK)
    size = -(-num_chunks // num_blocks)

    def in_blocks(x_M: jax.Array) -> jax.Array:
        padded = jnp.pad(x_M, ((0, num_blocks * size - num_chunks), *[(0, 0)] * (x_M.ndim - 1)))
        return padded.reshape(num_blocks, size, *x_M.shape[1:])

    blocks = jax.tree.map(in_blocks, chunks)
    if num_blocks == 1:
        return _block_energies(w_BxHxKxV, jax.tree.map(lambda x: x[0], blocks))[1]
    energy_LxTxBxH = jax.lax.scan(_block_energies, w_BxHxKxV, blocks)[1]
    return energy_LxTxBxH.reshape(-1, *energy_LxTxBxH.shape[2:])[:num_chunks]


def _block_energies(w_BxHxKxV: jax.Array, block: _Chunks) -> tuple[jax.Array, jax.Array]:
    """The memory after a block of T chunks and its energies `(T, B, H)`: one product with the decays between them."""
    dtype = w_BxHxKxV.dtype
    weighted_TxBxCxHxK = block.k_MxBxCxHxK.astype(dtype) * block.weight_MxBxCxH[..., None]
    written_TxBxHxKxV = jnp.einsum("tbchk,tbchv->tbhkv", weighted_TxBxCxHxK, block.v_MxBxCxHxV.astype(dtype))
    # To the decays between chunks, chunks are what tokens are to those inside one.
    decays = chunk_decays(jnp.moveaxis(block.log_decay_MxBxH, 0, 2)[:, :, None], block.has_reset_MxB.T[:, None])
    memory_TxBxHxKxV = jnp.einsum(
        "bhst,tbhkv->sbhkv", decays.between[:, :, 0], written_TxBxHxKxV, precision=jax.lax.Precision.HIGHEST
    )
    entry_TxBxH = jnp.moveaxis(decays.from_entry[:, :, 0], 2, 0)
    memory_TxBxHxKxV += entry_TxBxH[..., None, None] * w_BxHxKxV
    return memory_TxBxHxKxV[-1], energy(memory_TxBxHxKxV)


def close_interval(lyapunov: LyapunovState, end_energy_BxH: jax.Array, start_energy_BxH: jax.Array) -> LyapunovState:
    """Judge the interval that ends with `end_energy` and begin the next one from `start_energy` (after
    consolidation).
    """
    end_energy_BxH, start_energy_BxH = jax.lax.stop_gradient((end_energy_BxH, start_energy_BxH))
    # A chunk cut short by the interval's end (streams without consolidation) still counts as supply.
    tail_BxH = jnp.maximum(end_energy_BxH - jnp.exp(-2 * lyapunov.chunk_decay_BxH) * lyapunov.chunk_energy_BxH, 0)
    tail_BxH = jnp.where(lyapunov.chunk_decay_BxH > 0, tail_BxH, 0)
    change_BxH = end_energy_BxH - lyapunov.interval_energy_BxH
    stable_BxH = change_BxH <= GROWTH_SHARE * (lyapunov.supply_BxH + tail_BxH)
    return replace(
        opened(start_energy_BxH), stable_BxH=stable_BxH.astype(start_energy_BxH.dtype), energy_change_BxH=change_BxH
    )

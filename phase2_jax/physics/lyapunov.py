"""Lyapunov monitor: does dissipation keep up with what is written?

Energy of a head is E = ‖W‖². The exact dynamics W_t = e^{-Γ_t dt} W_{t-1} + η k v^T give, over a chunk c of tokens
with accumulated decay Γ̄_c, the supply S_c = E_c − e^{−2Γ̄_c} E_{c−1}: the energy that writing added to what
dissipation left. Over an interval a head is *stable* iff

    E_end − E_start ≤ GROWTH_SHARE · Σ_c max(S_c, 0),

that is, at least nine tenths of what was supplied has been dissipated again. A memory that fills up is unstable by
this definition, one in its steady state is stable.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels import hebbian_scan
from pallas_kernels.chunking import walk

GROWTH_SHARE = 0.1
CHUNK = 64


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
    implementation: str | None = None,
) -> LyapunovState:
    """Follow the energy over N tokens that start from `w` at stream position `position`.

    Chunks end at stream positions that are multiples of `chunk`, however the stream is cut into calls, so the figures
    do not depend on the cutting. A document's reset restarts the interval. Read-only: no gradient flows through any of
    it. `implementation` is that of the scan, as in `pallas_kernels.hebbian_scan`.
    """
    lyapunov, w_BxHxKxV, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH = jax.lax.stop_gradient(
        (lyapunov, w_BxHxKxV, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH)
    )
    dtype = w_BxHxKxV.dtype
    num_tokens = k_BxNxHxK.shape[1]
    offset = position % chunk
    # Tokens are laid into whole chunks at the offset where the stream stands.
    num_chunks = 1 if num_tokens == 1 else -(-num_tokens // chunk) + (chunk > 1)

    def in_chunks(x_BxN: jax.Array) -> jax.Array:
        if num_tokens == 1:
            return x_BxN[None]
        padded = jnp.zeros((x_BxN.shape[0], num_chunks * chunk, *x_BxN.shape[2:]), x_BxN.dtype)
        padded = jax.lax.dynamic_update_slice_in_dim(padded, x_BxN, offset, axis=1)
        return jnp.moveaxis(padded.reshape(x_BxN.shape[0], num_chunks, chunk, *x_BxN.shape[2:]), 1, 0)

    energy_BxNxH = _energies(w_BxHxKxV, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN, implementation)
    # A chunk that does not end here is not asked for its energy.
    energy_MxBxH = in_chunks(energy_BxNxH)[:, :, -1]
    reset_MxBxC = in_chunks(reset_BxN)
    resets_after_MxBxC = jnp.cumsum(reset_MxBxC[..., ::-1], axis=-1)[..., ::-1] - reset_MxBxC
    current_MxBxCx1 = (resets_after_MxBxC == 0)[..., None]
    log_decay_MxBxH = jnp.sum(jnp.where(current_MxBxCx1, in_chunks(log_decay_BxNxH.astype(dtype)), 0), axis=2)
    has_reset_MxB = jnp.any(reset_MxBxC, axis=2)
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

    return walk(step, lyapunov, (energy_MxBxH, log_decay_MxBxH, has_reset_MxB, ends_M))[0]


def _energies(
    w_BxHxKxV: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    reset_BxN: jax.Array,
    implementation: str | None,
) -> jax.Array:
    """‖W_t‖² after every token, `(B, N, H)`, of a memory that is `w` before the first.

    What a write adds is known from what its own key reads afterwards, r_t = W_tᵀ k_t:

        E_t = e^{−2Γ_t dt} E_{t−1} + η_t v_t·(2 r_t − η_t ‖k_t‖² v_t).
    """
    dtype = w_BxHxKxV.dtype
    r_BxNxHxV, _ = hebbian_scan(
        k_BxNxHxK,
        k_BxNxHxK,
        v_BxNxHxV,
        log_decay_BxNxH,
        eta_BxNxH,
        w_BxHxKxV,
        reset=reset_BxN,
        implementation=implementation,
    )
    v_BxNxHxV = v_BxNxHxV.astype(dtype)
    own_BxNxH = eta_BxNxH * jnp.sum(jnp.square(k_BxNxHxK.astype(dtype)), axis=-1)
    added_BxNxH = jnp.sum(v_BxNxHxV * (2 * r_BxNxHxV.astype(dtype) - own_BxNxH[..., None] * v_BxNxHxV), axis=-1)
    # A token that writes nothing may have values whose square is infinite.
    added_BxNxHx1 = jnp.where(eta_BxNxH == 0, 0, added_BxNxH)[..., None]
    ones_BxNxHx1 = jnp.ones_like(added_BxNxHx1)
    start_BxHx1x1 = energy(w_BxHxKxV)[..., None, None]
    energy_BxNxHx1, _ = hebbian_scan(
        ones_BxNxHx1, ones_BxNxHx1, added_BxNxHx1, 2 * log_decay_BxNxH, eta_BxNxH, start_BxHx1x1, reset=reset_BxN
    )
    return jnp.maximum(energy_BxNxHx1[..., 0], 0)


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

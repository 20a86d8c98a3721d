"""Lyapunov monitor: does dissipation keep up with what is written?

Energy of a head is E = ‖W‖². The exact dynamics W_t = e^{-Γ_t dt} W_{t-1} + η k v^T give, over a chunk c of tokens
with accumulated decay Γ̄_c, the supply S_c = E_c − e^{−2Γ̄_c} E_{c−1}: the energy that writing added to what
dissipation left. Over an interval a head is *stable* iff

    E_end − E_start ≤ GROWTH_SHARE · Σ_c max(S_c, 0),

that is, at least nine tenths of what was supplied has been dissipated again. A memory that fills up is unstable by
this definition, one in its steady state is stable.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

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


def energy(w_BxHxKxV: jax.Array) -> jax.Array:
    """E = ‖W‖² of every head, `(B, H)`."""
    return jnp.sum(jnp.square(w_BxHxKxV), axis=(-2, -1))


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

    ends = (jnp.arange(num_chunks) + 1) * chunk <= offset + num_tokens
    xs = (
        in_chunks(k_BxNxHxK),
        in_chunks(v_BxNxHxV),
        in_chunks(log_decay_BxNxH.astype(dtype)),
        in_chunks(eta_BxNxH.astype(dtype)),
        in_chunks(reset_BxN),
        ends,
    )

    def step(carry, x):
        w_BxHxKxV, state = carry
        k_BxCxHxK, v_BxCxHxV, log_decay_BxCxH, eta_BxCxH, reset_BxC, ends_here = x
        resets_after_BxC = jnp.cumsum(reset_BxC[:, ::-1], axis=1)[:, ::-1] - reset_BxC
        current_BxC = resets_after_BxC == 0
        has_reset_Bx1 = jnp.any(reset_BxC, axis=1)[:, None]
        kept_BxCxH = jnp.where(current_BxC[..., None], log_decay_BxCxH, 0)
        to_end_BxCxH = jnp.cumsum(kept_BxCxH[:, ::-1], axis=1)[:, ::-1] - kept_BxCxH
        weight_BxCxH = jnp.where(current_BxC[..., None], jnp.exp(jnp.minimum(to_end_BxCxH, 0)) * eta_BxCxH, 0)
        decay_BxH = -jnp.sum(kept_BxCxH, axis=1)
        written_BxHxKxV = jnp.einsum(
            "bchk,bchv->bhkv", k_BxCxHxK.astype(dtype) * weight_BxCxH[..., None], v_BxCxHxV.astype(dtype)
        )
        left_BxH = jnp.where(has_reset_Bx1, 0, jnp.exp(-decay_BxH))
        w_BxHxKxV = left_BxH[..., None, None] * w_BxHxKxV + written_BxHxKxV
        chunk_decay_BxH = jnp.where(has_reset_Bx1, 0, state.chunk_decay_BxH) + decay_BxH
        chunk_energy_BxH = jnp.where(has_reset_Bx1, 0, state.chunk_energy_BxH)
        interval_energy_BxH = jnp.where(has_reset_Bx1, 0, state.interval_energy_BxH)
        supply_BxH = jnp.where(has_reset_Bx1, 0, state.supply_BxH)
        end_energy_BxH = energy(w_BxHxKxV)
        supplied_BxH = jnp.maximum(end_energy_BxH - jnp.exp(-2 * chunk_decay_BxH) * chunk_energy_BxH, 0)
        state = LyapunovState(
            chunk_energy_BxH=jnp.where(ends_here, end_energy_BxH, chunk_energy_BxH),
            chunk_decay_BxH=jnp.where(ends_here, 0, chunk_decay_BxH),
            interval_energy_BxH=interval_energy_BxH,
            supply_BxH=jnp.where(ends_here, supply_BxH + supplied_BxH, supply_BxH),
            stable_BxH=state.stable_BxH,
            energy_change_BxH=state.energy_change_BxH,
        )
        return (w_BxHxKxV, state), None

    lyapunov = jax.tree.map(stop, lyapunov)
    return jax.lax.scan(step, (w_BxHxKxV, lyapunov), xs)[0][1]


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
    return LyapunovState(
        chunk_energy_BxH=start_energy_BxH,
        chunk_decay_BxH=jnp.zeros_like(start_energy_BxH),
        interval_energy_BxH=start_energy_BxH,
        supply_BxH=jnp.zeros_like(start_energy_BxH),
        stable_BxH=stable_BxH.astype(start_energy_BxH.dtype),
        energy_change_BxH=change_BxH,
    )

"""Figures about a memory, read-only: they are computed whether or not the mechanism they describe is on."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from phase2_jax.memory import resonance, snr
from phase2_jax.memory.config import MemoryConfig
from phase2_jax.memory.state import MemoryState
from phase2_jax.physics import lyapunov


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryDiagnostics:
    """Scalars of one layer, or arrays `(L,)` when stacked over the layers.

    Attributes:
      gamma_mean, gamma_std, gamma_min, gamma_max: forgetting rate Γ over the call's tokens, heads and rows (1/time;
        half-life ln2/(Γ·dt)).
      overdamped_ratio: share of (token, head) with Γ > |V|.
      snr_mean, snr_low_ratio: |W|/σ and the share below the SNR threshold, at the call's end.
      resonant_modes, resonance_energy: modes above the resonance threshold and Σ of mode energies, mean over rows and
        heads.
      stable_ratio, energy_change: verdict of the last completed interval (`physics.lyapunov`) and its E_end − E_start.
      energy: ‖W‖² at the call's end, mean over rows and heads.
      coherence: ‖W‖ / B ≤ 1, how far the writes add up instead of cancelling.
    """

    gamma_mean: jax.Array
    gamma_std: jax.Array
    gamma_min: jax.Array
    gamma_max: jax.Array
    overdamped_ratio: jax.Array
    snr_mean: jax.Array
    snr_low_ratio: jax.Array
    resonant_modes: jax.Array
    resonance_energy: jax.Array
    stable_ratio: jax.Array
    energy: jax.Array
    energy_change: jax.Array
    coherence: jax.Array


def diagnose(
    gamma_BxNxP: jax.Array, potential_BxNxP: jax.Array, state: MemoryState, config: MemoryConfig
) -> MemoryDiagnostics:
    """Figures of one layer after a call, each a float32 scalar without gradient."""
    gamma_BxNxP, potential_BxNxP, state = jax.lax.stop_gradient((gamma_BxNxP, potential_BxNxP, state))
    snr_BxH, low_BxH = snr.statistics(state.w_BxHxKxV, config.snr.threshold)
    modes_BxH, mode_energy_BxH = resonance.statistics(state.w_BxHxKxV, config.resonance.threshold)
    energy_BxH = lyapunov.energy(state.w_BxHxKxV)
    bound_BxH = state.coherence_BxH
    coherence_BxH = jnp.where(bound_BxH > 0, jnp.sqrt(energy_BxH) / jnp.where(bound_BxH > 0, bound_BxH, 1), 0)
    return MemoryDiagnostics(
        gamma_mean=jnp.mean(gamma_BxNxP),
        gamma_std=jnp.std(gamma_BxNxP),
        gamma_min=jnp.min(gamma_BxNxP),
        gamma_max=jnp.max(gamma_BxNxP),
        overdamped_ratio=jnp.mean((gamma_BxNxP > jnp.abs(potential_BxNxP)).astype(jnp.float32)),
        snr_mean=jnp.mean(snr_BxH),
        snr_low_ratio=jnp.mean(low_BxH),
        resonant_modes=jnp.mean(modes_BxH),
        resonance_energy=jnp.mean(mode_energy_BxH),
        stable_ratio=jnp.mean(state.lyapunov.stable_BxH),
        energy=jnp.mean(energy_BxH),
        energy_change=jnp.mean(state.lyapunov.energy_change_BxH),
        coherence=jnp.mean(coherence_BxH),
    )

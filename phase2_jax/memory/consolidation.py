"""What happens to a memory at every `consolidation.interval` tokens of the stream."""

from dataclasses import replace

import jax.numpy as jnp

from phase2_jax.memory import resonance, snr
from phase2_jax.memory.config import MemoryConfig
from phase2_jax.memory.state import MemoryState
from phase2_jax.physics import lyapunov


def consolidate(state: MemoryState, config: MemoryConfig) -> MemoryState:
    """SNR selection, then resonance, then the verdict of the Lyapunov monitor; the decay count starts anew."""
    w_BxHxKxV = state.w_BxHxKxV
    eta_factor_BxH = jnp.ones_like(state.eta_factor_BxH)
    if config.snr.enabled:
        w_BxHxKxV, high_BxH = snr.select(w_BxHxKxV, state.decay_BxH, config.snr.threshold, config.snr.gamma_boost)
        eta_factor_BxH = 1 + (config.snr.eta_boost - 1) * high_BxH
    if config.resonance.enabled:
        w_BxHxKxV = resonance.resonate(w_BxHxKxV, config.resonance.threshold)
    monitor = lyapunov.close_interval(state.lyapunov, lyapunov.energy(state.w_BxHxKxV), lyapunov.energy(w_BxHxKxV))
    gamma_factor_BxH = state.gamma_factor_BxH
    if config.lyapunov.control:
        gamma_factor_BxH = jnp.where(monitor.stable_BxH > 0, 1.0, config.lyapunov.gamma_boost).astype(
            gamma_factor_BxH.dtype
        )
    return replace(
        state,
        w_BxHxKxV=w_BxHxKxV,
        eta_factor_BxH=eta_factor_BxH,
        decay_BxH=jnp.zeros_like(state.decay_BxH),
        gamma_factor_BxH=gamma_factor_BxH,
        lyapunov=monitor,
    )

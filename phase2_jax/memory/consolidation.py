"""What happens to a memory at every `consolidation.interval` tokens of the stream."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from phase2_jax.memory import resonance, snr
from phase2_jax.memory.config import MemoryConfig
from phase2_jax.memory.state import MemoryState
from phase2_jax.physics import lyapunov


def consolidate(state: MemoryState, config: MemoryConfig) -> MemoryState:
    """SNR selection, then resonance, then the verdict of the Lyapunov monitor; the decay count starts anew."""
    return judge(refine(state, config), lyapunov.energy(state.w_BxHxKxV), config)


def refine(state: MemoryState, config: MemoryConfig) -> MemoryState:
    """`consolidate` without the monitor, which only reads unless `lyapunov.control` is on."""
    w_BxHxKxV = state.w_BxHxKxV
    eta_factor_BxH = jnp.ones_like(state.eta_factor_BxH)
    if config.snr.enabled:
        w_BxHxKxV, high_BxH = snr.select(w_BxHxKxV, state.decay_BxH, config.snr.threshold, config.snr.gamma_boost)
        eta_factor_BxH = 1 + (config.snr.eta_boost - 1) * high_BxH
    if config.resonance.enabled:
        w_BxHxKxV = resonance.resonate(w_BxHxKxV, config.resonance.threshold)
    return replace(state, w_BxHxKxV=w_BxHxKxV, eta_factor_BxH=eta_factor_BxH, decay_BxH=jnp.zeros_like(state.decay_BxH))


def judge(refined: MemoryState, end_energy_BxH: jax.Array, config: MemoryConfig) -> MemoryState:
    """The monitor's verdict on the interval that ended with that energy before `refine`, and what follows from it."""
    monitor = lyapunov.close_interval(refined.lyapunov, end_energy_BxH, lyapunov.energy(refined.w_BxHxKxV))
    gamma_factor_BxH = refined.gamma_factor_BxH
    if config.lyapunov.control:
        gamma_factor_BxH = jnp.where(monitor.stable_BxH > 0, 1.0, config.lyapunov.gamma_boost).astype(
            gamma_factor_BxH.dtype
        )
    return replace(refined, gamma_factor_BxH=gamma_factor_BxH, lyapunov=monitor)

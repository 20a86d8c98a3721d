"""What a consolidation does to a memory: order, switches, every field of the state."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.memory import resonance, snr
from phase2_jax.memory.config import LyapunovConfig, MemoryConfig, ResonanceConfig, SnrConfig
from phase2_jax.memory.consolidation import consolidate
from phase2_jax.memory.state import MemoryState, init_memory_state
from phase2_jax.physics import lyapunov

B, H, K, V = 2, 3, 4, 5
SNR, RESONANCE = SnrConfig(threshold=0.7, gamma_boost=3.0, eta_boost=1.8), ResonanceConfig(threshold=0.4)
NO_SNR, NO_RESONANCE = SnrConfig(enabled=False), ResonanceConfig(enabled=False)

same = np.testing.assert_array_equal
# The same float32 operations, compiled one by one there and in one program here.
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def state() -> MemoryState:
    rng = np.random.default_rng(0)
    random = lambda *shape: jnp.asarray(rng.random(shape), jnp.float32)  # noqa: E731
    return replace(
        init_memory_state(B, H, K, V, H, 2),
        w_BxHxKxV=random(B, H, K, V) ** 3 - 0.1,
        g_re_BxP=random(B, H),
        g_im_BxP=random(B, H),
        conv_tail_BxTxC=random(B, 2, H * (2 * K + V)),
        eta_factor_BxH=1 + random(B, H),
        decay_BxH=random(B, H),
        coherence_BxH=9 + random(B, H),
        gamma_factor_BxH=1 + random(B, H),
        lyapunov=replace(lyapunov.init_lyapunov_state(B, H), supply_BxH=2 * random(B, H)),
        position=jnp.asarray(24, jnp.int32),
    )


def selected(state: MemoryState) -> tuple[jax.Array, jax.Array]:
    return snr.select(state.w_BxHxKxV, state.decay_BxH, SNR.threshold, SNR.gamma_boost)


def test_noise_is_selected_before_modes(state):
    after = consolidate(state, MemoryConfig(snr=SNR, resonance=RESONANCE))
    w, high = selected(state)
    close(after.w_BxHxKxV, resonance.resonate(w, RESONANCE.threshold))
    # The other order is another memory.
    resonated = replace(state, w_BxHxKxV=resonance.resonate(state.w_BxHxKxV, RESONANCE.threshold))
    assert np.max(np.abs(after.w_BxHxKxV - selected(resonated)[0])) > 1e-3
    # Replaces the factor of the interval before, and does not compound with it.
    close(after.eta_factor_BxH, 1 + 0.8 * high)


def test_snr_alone(state):
    after = consolidate(state, MemoryConfig(snr=SNR, resonance=NO_RESONANCE))
    w, high = selected(state)
    close(after.w_BxHxKxV, w)
    close(after.eta_factor_BxH, 1 + 0.8 * high)


def test_resonance_alone(state):
    after = consolidate(state, MemoryConfig(snr=NO_SNR, resonance=RESONANCE))
    close(after.w_BxHxKxV, resonance.resonate(state.w_BxHxKxV, RESONANCE.threshold))
    same(after.eta_factor_BxH, 1)


def test_neither(state):
    after = consolidate(state, MemoryConfig(snr=NO_SNR, resonance=NO_RESONANCE))
    same(after.w_BxHxKxV, state.w_BxHxKxV)
    same(after.eta_factor_BxH, 1)


def test_the_rest_of_the_state(state):
    after = consolidate(state, MemoryConfig(snr=SNR, resonance=RESONANCE))
    for name in ("g_re_BxP", "g_im_BxP", "conv_tail_BxTxC", "coherence_BxH", "gamma_factor_BxH", "position"):
        same(getattr(after, name), getattr(state, name))
    same(after.decay_BxH, 0)
    # The interval that ends is judged by the energy before, the next one starts from the energy after.
    before, now = lyapunov.energy(state.w_BxHxKxV), lyapunov.energy(after.w_BxHxKxV)
    assert np.all(now < before)
    close(after.lyapunov.energy_change_BxH, before)
    close(after.lyapunov.interval_energy_BxH, now)
    close(after.lyapunov.chunk_energy_BxH, now)
    same(after.lyapunov.supply_BxH, 0)


def test_homeostasis_raises_gamma_of_unstable_heads_only(state):
    # Stable iff the energy, grown from 0, is at most a tenth of the supply.
    energy_BxH = np.asarray(lyapunov.energy(state.w_BxHxKxV))
    supply_BxH = np.where(np.arange(H) == 1, 11, 9) * energy_BxH
    state = replace(state, lyapunov=replace(state.lyapunov, supply_BxH=jnp.asarray(supply_BxH)))
    after = consolidate(state, MemoryConfig(lyapunov=LyapunovConfig(control=True, gamma_boost=1.7)))
    same(after.lyapunov.stable_BxH, [[0, 1, 0]] * B)
    same(after.gamma_factor_BxH, np.array([[1.7, 1, 1.7]] * B, np.float32))

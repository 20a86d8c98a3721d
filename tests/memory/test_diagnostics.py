"""Figures of a layer against numpy, whether or not the mechanisms they describe are on."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.memory import resonance, snr
from phase2_jax.memory.config import ConsolidationConfig, MemoryConfig, ResonanceConfig, SnrConfig
from phase2_jax.memory.diagnostics import diagnose
from phase2_jax.memory.state import MemoryState, init_memory_state

B, N, H, K, V = 2, 6, 3, 4, 5
OFF = MemoryConfig(ConsolidationConfig(0), SnrConfig(enabled=False), ResonanceConfig(enabled=False))


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "gamma": jnp.asarray(rng.exponential(1.0, (B, N, H)), jnp.float32),
        "potential": jnp.asarray(rng.standard_normal((B, N, H)), jnp.float32),
        "w": jnp.asarray(rng.standard_normal((B, H, K, V)) ** 3, jnp.float32),
        "bound": jnp.asarray(50 + rng.random((B, H)), jnp.float32).at[0, 0].set(0),  # an empty head
        "stable": jnp.asarray(rng.random((B, H)) < 0.5, jnp.float32),
        "change": jnp.asarray(rng.standard_normal((B, H)), jnp.float32),
    }


def state_of(arrays: dict[str, jax.Array]) -> MemoryState:
    state = init_memory_state(B, H, K, V, H, 0)
    monitor = replace(state.lyapunov, stable_BxH=arrays["stable"], energy_change_BxH=arrays["change"])
    return replace(state, w_BxHxKxV=arrays["w"], coherence_BxH=arrays["bound"], lyapunov=monitor)


@pytest.mark.parametrize("config", [MemoryConfig(), OFF], ids=["on", "off"])
def test_figures(arrays, config):
    figures = diagnose(arrays["gamma"], arrays["potential"], state_of(arrays), config)
    gamma, w, bound = (np.asarray(arrays[name], np.float64) for name in ("gamma", "w", "bound"))
    snr_BxH, low_BxH = snr.statistics(arrays["w"], 0.5)
    modes_BxH, mode_energy_BxH = resonance.statistics(arrays["w"], 0.1)
    norm_BxH = np.linalg.norm(w, axis=(2, 3))
    expected = {
        "gamma_mean": gamma.mean(),
        "gamma_std": gamma.std(),
        "gamma_min": gamma.min(),
        "gamma_max": gamma.max(),
        "overdamped_ratio": (gamma > np.abs(arrays["potential"])).mean(),
        "snr_mean": np.mean(snr_BxH),
        "snr_low_ratio": np.mean(low_BxH),
        "resonant_modes": np.mean(modes_BxH),
        "resonance_energy": np.mean(mode_energy_BxH),
        "stable_ratio": np.mean(arrays["stable"]),
        "energy": (norm_BxH**2).mean(),
        "energy_change": np.mean(arrays["change"]),
        "coherence": np.divide(norm_BxH, bound, out=np.zeros_like(bound), where=bound > 0).mean(),
    }
    assert {item.name for item in fields(figures)} == expected.keys()
    for name, value in expected.items():
        # Means of float32 numbers.
        np.testing.assert_allclose(getattr(figures, name), value, rtol=1e-5, err_msg=name)


def test_an_empty_memory_has_finite_figures():
    figures = diagnose(jnp.ones((B, N, 1)), jnp.zeros((B, N, 1)), init_memory_state(B, H, K, V, 1, 0), MemoryConfig())
    for name, value in vars(figures).items():
        assert np.isfinite(value), name
    assert figures.snr_mean == figures.energy == figures.coherence == figures.resonant_modes == 0


def test_read_only(arrays):
    def total(arrays):
        figures = diagnose(arrays["gamma"], arrays["potential"], state_of(arrays), MemoryConfig())
        return sum(jax.tree.leaves(figures))

    for name, slope in jax.grad(total)(arrays).items():
        np.testing.assert_array_equal(slope, 0, err_msg=name)

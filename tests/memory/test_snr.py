"""SNR selection against its formulas, written out in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.memory import snr

THRESHOLD, BOOST = 0.5, 2.0


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    # Heavy-tailed, as fast weights are.
    return np.random.default_rng(0).standard_normal((2, 3, 4, 5)) ** 3


def low(w_BxHxKxV: np.ndarray, threshold: float) -> np.ndarray:
    sigma_BxHx1x1 = w_BxHxKxV.std(axis=(2, 3), keepdims=True) + 1e-6
    return 1 / (1 + (np.abs(w_BxHxKxV) / sigma_BxHx1x1 / threshold) ** 4)


@pytest.mark.usefixtures("x64")
def test_selection(weights):
    """Low components lose exp(−(boost − 1)·Γ̂·l), r is the share of the others."""
    decay_BxH = np.array([[0.0, 1e-3, 0.2], [1.0, 5.0, 40.0]])
    kept, high = snr.select(jnp.asarray(weights), jnp.asarray(decay_BxH), THRESHOLD, 3.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_decay_BxH = np.where(decay_BxH > 0, 1 - decay_BxH / np.expm1(decay_BxH), 0)
    low_BxHxKxV = low(weights, THRESHOLD)
    expected = weights * np.exp(-2.0 * mean_decay_BxH[..., None, None] * low_BxHxKxV)
    # Float64; the series for the mean decay is good to 3e-9 of it.
    np.testing.assert_allclose(kept, expected, rtol=1e-8)
    np.testing.assert_allclose(high, 1 - low_BxHxKxV.mean(axis=(2, 3)), rtol=1e-12)


def test_membership_is_soft_and_half_at_the_threshold():
    ratio = jnp.array([0.0, 0.25, 0.5, 1.0, 1e30])
    np.testing.assert_allclose(snr.low_weight(ratio, 0.5), [1, 16 / 17, 0.5, 1 / 17, 0], atol=1e-7)


@pytest.mark.parametrize("threshold", [0.0, 1e-12])
def test_threshold_zero_keeps_everything(weights, threshold):
    w = jnp.asarray(weights, jnp.float32)
    kept, high = snr.select(w, jnp.ones((2, 3)), threshold, BOOST)
    np.testing.assert_array_equal(kept, w)
    np.testing.assert_array_equal(high, 1)


def test_no_decay_or_no_boost_changes_nothing(weights):
    w = jnp.asarray(weights, jnp.float32)
    np.testing.assert_array_equal(snr.select(w, jnp.zeros((2, 3)), THRESHOLD, BOOST)[0], w)
    np.testing.assert_array_equal(snr.select(w, jnp.ones((2, 3)), THRESHOLD, 1.0)[0], w)


@pytest.mark.usefixtures("x64")
def test_mean_decay_of_writes_is_what_its_name_says():
    """Γ̂ = 1 − Γ̄/(e^Γ̄ − 1), the mean of s in [0, Γ̄] weighted by the e^{−s} that is left; from 1e-8 to 1e4."""
    decay = np.logspace(-8, 4, 61)
    # Below 1e-4 the closed form cancels; its series does not need more terms than these there.
    series = decay / 2 - decay**2 / 12 + decay**4 / 720
    expected = np.where(decay < 1e-3, series, 1 - decay * np.exp(-decay) / -np.expm1(-decay))
    # 3e-9: the first term of the series that the code leaves out, where it leaves it out.
    np.testing.assert_allclose(snr.mean_decay_of_writes(jnp.asarray(decay)), expected, rtol=5e-9)


def test_mean_decay_of_writes_as_an_integral():
    s = (np.arange(100_000) + 0.5) / 100_000 * 3.0
    expected = np.sum(s * np.exp(-s)) / np.sum(np.exp(-s))
    assert float(snr.mean_decay_of_writes(jnp.float32(3.0))) == pytest.approx(expected, rel=1e-6)


def test_mean_decay_of_writes_in_float32_is_finite_with_its_slope():
    decay = jnp.concatenate([jnp.zeros(1), jnp.logspace(-8, 4, 61)])
    value, slope = jax.vmap(jax.value_and_grad(snr.mean_decay_of_writes))(decay)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(slope))
    assert value[0] == 0
    assert slope[0] == pytest.approx(0.5)
    # float32 cancels to 1e-5 where the two forms meet.
    assert np.all(np.diff(value) >= 0)
    assert value[-1] == pytest.approx(1.0)


def test_an_empty_memory_is_selected_without_nan():
    w = jnp.zeros((1, 2, 3, 4))

    def total(w, decay):
        kept, high = snr.select(w, decay, THRESHOLD, BOOST)
        return jnp.sum(kept) + jnp.sum(high), (kept, high)

    (_, (kept, high)), (dw, ddecay) = jax.value_and_grad(total, (0, 1), has_aux=True)(w, jnp.full((1, 2), 0.3))
    np.testing.assert_array_equal(kept, 0)
    np.testing.assert_array_equal(high, 0)
    assert np.all(np.isfinite(dw))
    assert np.all(np.isfinite(ddecay))
    # What is written next keeps its value: exp(−Γ̂·1) of it.
    np.testing.assert_allclose(dw, np.exp(-snr.mean_decay_of_writes(jnp.float32(0.3))), rtol=1e-6)


def test_statistics():
    w = jnp.array([[1.0, -1.0], [1.0, 5.0]])[None, None]
    sigma = np.std([1, -1, 1, 5]) + 1e-6
    mean, low_ratio = snr.statistics(w, 0.5)
    np.testing.assert_allclose(mean, [[8 / 4 / sigma]], rtol=1e-6)
    # |±1| / 2.18 = 0.46 is below the threshold, 5 / 2.18 above.
    np.testing.assert_allclose(low_ratio, [[0.75]])

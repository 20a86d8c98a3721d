"""Memory resonance against dense complex matrices in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.memory import resonance
from phase2_jax.physics.zeta import resonance_basis

K, V = 8, 5


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    """Modes of widely different energies, so that a threshold of 0.1 falls among them."""
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((2, 3, K, V)) * np.logspace(0, -2.5, K)[:, None]
    return (resonance_basis(K) @ modes).real.astype(np.float32)


def energies(w_BxHxKxV: np.ndarray) -> np.ndarray:
    return np.linalg.norm(resonance_basis(w_BxHxKxV.shape[-2]).conj().T @ w_BxHxKxV, axis=-1)


def resonate(w_BxHxKxV: np.ndarray, threshold: float) -> np.ndarray:
    u_KxK, e_BxHxK = resonance_basis(w_BxHxKxV.shape[-2]), energies(w_BxHxKxV)
    m_BxHxK = 1 / (1 + (threshold * e_BxHxK.max(-1, keepdims=True) / e_BxHxK) ** 8)
    projector_BxHxKxK = (u_KxK * m_BxHxK[..., None, :]) @ u_KxK.conj().T
    return projector_BxHxKxK.real @ w_BxHxKxV


# Products of float32 matrices of width 8 and size 1.
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)


def test_mode_energies(weights):
    close(resonance.mode_energies_squared(weights), energies(weights) ** 2)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1.0])
def test_against_dense_matrices(weights, threshold):
    expected = resonate(weights, threshold)
    close(resonance.resonate(jnp.asarray(weights), threshold), expected)
    assert np.linalg.norm(expected - weights) > 1e-3 * np.linalg.norm(weights), "nothing faded: a useless example"


@pytest.mark.parametrize("threshold", [1e-30, 1e-5])
def test_tiny_thresholds_keep_all_but_the_weakest(weights, threshold):
    close(resonance.resonate(jnp.asarray(weights), threshold), weights)


def test_threshold_zero_is_the_identity(weights):
    """U is unitary, so nothing is lost there and back."""
    close(resonance.resonate(jnp.asarray(weights), 0.0), weights)


def test_threshold_one_halves_the_strongest_mode():
    weights = resonance.mode_weights(jnp.array([4.0, 1.0, 0.0]), 1.0)
    # e = 2, 1, 0: 1/(1 + 1), 1/(1 + 2⁸), 0
    np.testing.assert_allclose(weights, [0.5, 1 / 257, 0], rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3), (1, 2, 3, 7), (1, 1, 16, 1)])
def test_any_shape_is_a_contraction(shape):
    w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    for threshold in (0.1, 0.6, 1.0):
        after = np.asarray(resonance.resonate(jnp.asarray(w), threshold))
        close(after, resonate(w, threshold))
        # Re of a Hermitian projector-like matrix with eigenvalues in [0, 1]: no head gains energy beyond rounding.
        assert np.all(np.linalg.norm(after, axis=(2, 3)) <= np.linalg.norm(w, axis=(2, 3)) * (1 + 1e-6))


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 1e-5, 0.1, 1.0])
def test_an_empty_memory_stays_empty_with_finite_gradients(threshold):
    w = jnp.zeros((1, 2, K, V))

    def total(w):
        after = resonance.resonate(w, threshold)
        return jnp.sum(after), after

    (_, after), gradient = jax.value_and_grad(total, has_aux=True)(w)
    np.testing.assert_array_equal(after, 0)
    assert np.all(np.isfinite(gradient))


def test_gradient_with_an_empty_head_beside_a_full_one(weights):
    w = jnp.asarray(weights).at[0, 1].set(0)
    gradient = jax.grad(lambda w: jnp.sum(jnp.square(resonance.resonate(w, 0.1))))(w)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient[0, 0] != 0)


def test_the_same_memory_at_any_scale(weights):
    """Thresholds are relative to the strongest mode of the head."""
    scaled = resonance.resonate(jnp.asarray(weights * 1e4), 0.1)
    np.testing.assert_allclose(scaled, 1e4 * np.asarray(resonance.resonate(jnp.asarray(weights), 0.1)), rtol=1e-3)


def test_statistics(weights):
    count, total = resonance.statistics(jnp.asarray(weights), 0.1)
    e_BxHxK = energies(weights)
    np.testing.assert_array_equal(count, (e_BxHxK > 0.1 * e_BxHxK.max(-1, keepdims=True)).sum(-1))
    np.testing.assert_allclose(total, e_BxHxK.sum(-1), rtol=1e-5)
    assert 1 < np.mean(count) < K, "the threshold separates nothing: a useless example"


def test_statistics_of_an_empty_memory():
    count, total = resonance.statistics(jnp.zeros((1, 2, K, V)), 0.1)
    np.testing.assert_array_equal(count, 0)
    np.testing.assert_array_equal(total, 0)

"""Half-lives and the biases that give them: float64 numpy, so tolerances are a few ulp of it."""

import numpy as np
import pytest

from phase2_jax.physics.potential import gamma_bias, half_lives, longest_half_life, softplus_inverse


def softplus(x):
    return np.logaddexp(0.0, x)


def test_longest_half_life_is_half_the_cap():
    # The floor alone halves a memory in ln2 / (base_decay·dt) tokens: 69.3 at 0.01.
    assert longest_half_life(0.01, 1.0) == pytest.approx(34.657359)
    assert longest_half_life(0.01, 0.5) == pytest.approx(69.314718)


def test_half_lives_are_a_geometric_sequence():
    np.testing.assert_allclose(half_lives(4, 2.0, 54.0), [2, 6, 18, 54])


def test_one_head_gets_the_geometric_mean():
    np.testing.assert_allclose(half_lives(1, 2.0, 32.0), [8])


@pytest.mark.parametrize("y", [1e-12, 1e-6, 0.1, 1.0, 30.0, 800.0])
def test_softplus_inverse(y):
    x = softplus_inverse(np.array(y))
    assert np.isfinite(x)
    # softplus amplifies a rounding of x by at most |x|, 28 at the smallest y.
    assert softplus(x) == pytest.approx(y, rel=1e-13)


@pytest.mark.parametrize("dt", [0.25, 1.0, 2.0])
def test_a_bias_gives_its_half_life(dt):
    wanted_H = np.array([2.0, 7.0, 300.0])
    gamma_H = 1e-4 + softplus(gamma_bias(wanted_H, 1e-4, dt))
    # e^{-Γ·dt·half-life} = ½
    np.testing.assert_allclose(np.exp(-gamma_H * dt * wanted_H), 0.5, rtol=1e-12)


def test_a_half_life_beyond_the_cap_is_refused():
    with pytest.raises(ValueError, match=r"half-life 70\.0 is beyond the cap 69\.3 of base_decay 0\.01"):
        gamma_bias(np.array([2.0, 70.0]), 0.01, 1.0)

"""Zeros, initialisation and embedding formula against the deterministic parts of the original's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.physics import zeta


def test_first_zeros(zeta_numbers):
    # It listed ten zeros to six decimals and made up the rest; float32 holds those to 2e-6.
    np.testing.assert_allclose(zeta.zeta_zeros(10), zeta_numbers["zeros10"], atol=3e-6)


@pytest.mark.parametrize("width", [8, 20])
def test_embedding(zeta_numbers, width):
    zeros = zeta_numbers["zeros10"][: width // 2]
    embedding = zeta.position_embedding(jnp.arange(64), width, zeros)
    # The original's float32 phases reach 63·49.8/2π = 499 rad, of which float32 keeps 3e-5.
    np.testing.assert_allclose(embedding, zeta_numbers[f"embedding_64x{width}"], atol=6e-5)


@pytest.mark.parametrize("shape", ["8x8", "10x32", "32x6", "1x32", "32x2"])
def test_initialisation_up_to_its_scale(zeta_numbers, shape):
    """Same singular vectors and proportions; the original scaled to 0.02/ζ_1, ours keeps the draw's norm."""
    before, after = zeta_numbers[f"linear_{shape}/before"], zeta_numbers[f"linear_{shape}/after"]
    made = np.asarray(
        zeta.zeta_initializer(lambda key, shape, dtype=None, out_sharding=None: jnp.asarray(before))(
            jax.random.key(0), before.shape, jnp.float32
        )
    )
    np.testing.assert_allclose(np.linalg.norm(made), np.linalg.norm(before), rtol=1e-5)
    # Singular vectors of nearly equal singular values are only determined to 1e-4 in float32.
    np.testing.assert_allclose(made / np.linalg.norm(made), after / np.linalg.norm(after), atol=1e-4)

"""Memory resonance: fast weights seen in a unitary basis of zeta frequencies, weak modes faded out."""

import jax
import jax.numpy as jnp
import numpy as np

from phase2_jax.physics import zeta

# Energies squared below this count as an empty memory; the derivative divides by its square, which float32 must hold.
EMPTY = 1e-18
# Modes this many times above the threshold are kept whole to float32's last digit.
LARGEST_RATIO = 1e4
SMALLEST_THRESHOLD = 1e-12


def _stacked(basis_KxK: np.ndarray, dtype: jnp.dtype) -> jax.Array:
    """Real and imaginary part below each other, `(2K, K)`."""
    return jnp.asarray(np.concatenate([np.real(basis_KxK), np.imag(basis_KxK)]), dtype)


def _modes(w_BxHxKxV: jax.Array, inverse_basis_KxK: np.ndarray) -> jax.Array:
    """Real parts of all modes of U⁻¹ W, then their imaginary parts, `(B, H, 2K, V)`."""
    rotation_JxK = _stacked(inverse_basis_KxK, w_BxHxKxV.dtype)
    return jnp.einsum("jk,bhkv->bhjv", rotation_JxK, w_BxHxKxV, precision="highest")


def project(
    w_BxHxKxV: jax.Array, mode_weights_BxHxK: jax.Array, basis_KxK: np.ndarray, inverse_basis_KxK: np.ndarray
) -> jax.Array:
    """Re(U diag(m) U⁻¹) W for a complex basis U `(K, K)` and mode weights m `(B, H, K)`."""
    weights_BxHxJ = jnp.tile(mode_weights_BxHxK.astype(w_BxHxKxV.dtype), 2)
    weighted_BxHxJxV = weights_BxHxJ[..., None] * _modes(w_BxHxKxV, inverse_basis_KxK)
    # Conjugated for the minus sign that imaginary times imaginary has.
    back_JxK = _stacked(basis_KxK.conj().T, w_BxHxKxV.dtype)
    return jnp.einsum("jk,bhjv->bhkv", back_JxK, weighted_BxHxJxV, precision="highest")


def mode_energies_squared(w_BxHxKxV: jax.Array) -> jax.Array:
    """e_i² = ‖(Uᴴ W)_i‖² of every mode, `(B, H, K)`, in the unitary zeta basis."""
    basis_KxK = zeta.resonance_basis(w_BxHxKxV.shape[-2])
    parts_BxHxJ = jnp.sum(jnp.square(_modes(w_BxHxKxV, basis_KxK.conj().T)), axis=-1)
    re_BxHxK, im_BxHxK = jnp.split(parts_BxHxJ, 2, axis=-1)
    return re_BxHxK + im_BxHxK


def mode_weights(energies_squared_BxHxK: jax.Array, threshold: float) -> jax.Array:
    """m_i = 1 / (1 + (threshold · max e / e_i)⁸), `(B, H, K)` in [0, 1]."""
    if threshold == 0:
        return jnp.ones_like(energies_squared_BxHxK)
    relative = energies_squared_BxHxK / (jnp.max(energies_squared_BxHxK, axis=-1, keepdims=True) + EMPTY)
    # (e_i / (threshold · max e))², cut so that its powers and their derivatives stay finite down to threshold 0.
    ratio = jnp.minimum(relative / max(threshold, SMALLEST_THRESHOLD) ** 2, LARGEST_RATIO)
    power = jnp.square(jnp.square(ratio))
    return power / (1 + power)


def resonate(w_BxHxKxV: jax.Array, threshold: float) -> jax.Array:
    """W ← Re(U diag(m) Uᴴ) W: modes with e_i below `threshold` · max e fade out."""
    basis_KxK = zeta.resonance_basis(w_BxHxKxV.shape[-2])
    weights_BxHxK = mode_weights(mode_energies_squared(w_BxHxKxV), threshold)
    return project(w_BxHxKxV, weights_BxHxK, basis_KxK, basis_KxK.conj().T)


def statistics(w_BxHxKxV: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """Number of modes with e_i > threshold · max e, and Σ e_i, each `(B, H)`."""
    energies_BxHxK = jnp.sqrt(mode_energies_squared(w_BxHxKxV))
    resonant_BxHxK = energies_BxHxK > threshold * jnp.max(energies_BxHxK, axis=-1, keepdims=True)
    return jnp.sum(resonant_BxHxK, axis=-1).astype(w_BxHxKxV.dtype), jnp.sum(energies_BxHxK, axis=-1)

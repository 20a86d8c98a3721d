"""Initialisers of the projections."""

import jax
from flax import nnx

from phase2_jax.model.config import ModelConfig
from phase2_jax.physics import zeta


def projection_initializer(config: ModelConfig, scale: float = 1.0) -> jax.nn.initializers.Initializer:
    """LeCun normal with variance `scale`² / fan_in, or the zeta spectrum with the same Frobenius norm."""
    standard = nnx.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    return zeta.zeta_initializer(standard) if config.zeta_init else standard

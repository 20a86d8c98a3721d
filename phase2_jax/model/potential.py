"""The non-Hermitian potential V − iΓ of a layer (design: H_eff = H_0 + V − iΓ)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phase2_jax.model.config import ModelConfig
from phase2_jax.model.initializers import projection_initializer
from phase2_jax.physics import potential

# Small, so that heads start at the half-lives they are given and still tell tokens apart.
RATE_STDDEV = 0.02


def initial_half_lives(config: ModelConfig, seq_len: int) -> np.ndarray:
    """Half-lives (tokens) the heads start with, `(P,)`, after the cap that base_decay sets."""
    longest = min(config.half_life_max or float(seq_len), potential.longest_half_life(config.base_decay, config.dt))
    return potential.half_lives(config.num_potentials, config.half_life_min, max(longest, config.half_life_min))


class Potential(nnx.Module):
    """V_t = w_V·x_t + f_t and Γ_t = base_decay + softplus(w_Γ·x_t + b_Γ), per head, in float32."""

    def __init__(self, config: ModelConfig, seq_len: int, rngs: nnx.Rngs):
        self.config = config
        width = config.num_potentials

        def rate() -> nnx.Linear:
            bias_P = potential.gamma_bias(initial_half_lives(config, seq_len), config.base_decay, config.dt)
            return nnx.Linear(
                config.d_model,
                width,
                kernel_init=nnx.initializers.normal(RATE_STDDEV),
                bias_init=lambda *_: jnp.asarray(bias_P, jnp.float32),
                rngs=rngs,
            )

        self.real = (
            nnx.Linear(config.d_model, width, use_bias=False, kernel_init=projection_initializer(config), rngs=rngs)
            if config.resolvent
            else None
        )
        used = config.memory or (config.resolvent and config.resolvent_gamma == "shared")
        self.rate = rate() if config.adaptive_decay and used else None
        own = config.resolvent and config.resolvent_gamma == "own" and config.adaptive_decay
        self.resolvent_rate = rate() if own else None

    def gamma(self, x_BxNxD: jax.Array) -> jax.Array:
        """Forgetting rate Γ of the memory, `(B, N, P)` float32."""
        return self._gamma(self.rate, x_BxNxD)

    def _gamma(self, rate: nnx.Linear | None, x_BxNxD: jax.Array) -> jax.Array:
        base = self.config.base_decay
        if rate is None:
            return jnp.full((*x_BxNxD.shape[:2], self.config.num_potentials), base, jnp.float32)
        return base + jax.nn.softplus(rate(x_BxNxD.astype(jnp.float32)))

    def __call__(self, x_BxNxD: jax.Array, feedback_BxN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """V, Γ of the memory and Γ of the Hamiltonian, each `(B, N, P)` float32; `feedback` is f_t of the layer
        below.
        """
        x_BxNxD = x_BxNxD.astype(jnp.float32)
        gamma_BxNxP = self.gamma(x_BxNxD)
        if self.real is None:
            return jnp.zeros_like(gamma_BxNxP) + feedback_BxN[..., None], gamma_BxNxP, gamma_BxNxP
        v_BxNxP = self.real(x_BxNxD) + feedback_BxN[..., None]
        kind = self.config.resolvent_gamma
        if kind == "none":
            return v_BxNxP, gamma_BxNxP, jnp.zeros_like(gamma_BxNxP)
        resolvent_gamma_BxNxP = self._gamma(self.resolvent_rate, x_BxNxD) if kind == "own" else gamma_BxNxP
        return v_BxNxP, gamma_BxNxP, resolvent_gamma_BxNxP

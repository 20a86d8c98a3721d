"""BK branch: features of the resolvent (H_eff − z)^{-1}, bounded by construction."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import resolvent_scan
from pallas_kernels.resolvent.api import IMPLEMENTATIONS
from phase2_jax.memory.state import MemoryState
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.initializers import projection_initializer
from phase2_jax.physics.potential import softplus_inverse

RESOLVENT_IMPLEMENTATIONS = tuple(entry.name for entry in IMPLEMENTATIONS)


class ResolventBranch(nnx.Module):
    """x ↦ Dense([Re, Im] of (Γ_t + ε)·g_t), g the left-connected Green's function (or the exact diagonal, two-sided).

    Energies E spread over [−1, 1], couplings h start at 1 (u = h² = 1, the longest reach) and ε is spread
    log-uniformly from 2·ε_min to 1.
    """

    def __init__(self, config: ModelConfig, implementation: str | None, rngs: nnx.Rngs):
        self.config = config
        # What the Hebbian scan has a kernel of its own for runs here as the default does.
        self.implementation = implementation if implementation in RESOLVENT_IMPLEMENTATIONS else None
        num = config.num_potentials
        energies_P = np.linspace(-1, 1, num) if num > 1 else np.zeros(1)
        epsilons_P = (
            np.geomspace(2 * config.epsilon_min, 1.0, num) if num > 1 else np.array([max(0.1, 2 * config.epsilon_min)])
        )
        self.energy = nnx.Param(jnp.asarray(energies_P, jnp.float32))
        self.epsilon_raw = nnx.Param(jnp.asarray(softplus_inverse(epsilons_P - config.epsilon_min), jnp.float32))
        self.coupling = nnx.Param(jnp.ones((num,), jnp.float32))
        self.out = nnx.Linear(
            2 * num,
            config.d_model,
            dtype=jnp.dtype(config.dtype),
            kernel_init=projection_initializer(config, config.num_layers**-0.5),
            rngs=rngs,
        )

    def features(
        self, v_BxNxP: jax.Array, gamma_BxNxP: jax.Array, state: MemoryState, reset_BxN: jax.Array
    ) -> tuple[jax.Array, MemoryState]:
        """[Re, Im] of (Γ + ε)·g, `(B, N, 2P)` float32 in the closed unit disk, and the state with the last g."""
        epsilon_P = self.config.epsilon_min + jax.nn.softplus(self.epsilon_raw[...])
        causal = self.config.bk_mode == "causal"
        g_re_BxNxP, g_im_BxNxP, final = resolvent_scan(
            v_BxNxP,
            gamma_BxNxP,
            jnp.square(self.coupling[...]),
            self.energy[...],
            epsilon_P,
            (state.g_re_BxP, state.g_im_BxP) if causal else None,
            reset=reset_BxN,
            mode=self.config.bk_mode,
            implementation=self.implementation,
        )
        scale_BxNxP = gamma_BxNxP + epsilon_P[None, None]
        features_BxNx2P = jnp.concatenate([scale_BxNxP * g_re_BxNxP, scale_BxNxP * g_im_BxNxP], axis=-1)
        if final is not None:
            state = replace(state, g_re_BxP=final[0], g_im_BxP=final[1])
        return features_BxNx2P, state

    def __call__(
        self, v_BxNxP: jax.Array, gamma_BxNxP: jax.Array, state: MemoryState, reset_BxN: jax.Array
    ) -> tuple[jax.Array, MemoryState]:
        """Branch output `(B, N, D)` in the compute dtype and the new state."""
        features_BxNx2P, state = self.features(v_BxNxP, gamma_BxNxP, state, reset_BxN)
        return self.out(features_BxNx2P), state

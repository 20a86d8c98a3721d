"""One layer: resolvent, memory and feed-forward branches, each pre-normed and residual."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from phase2_jax.memory.diagnostics import MemoryDiagnostics, diagnose
from phase2_jax.memory.state import MemoryState
from phase2_jax.model.barrier import stored_gradient
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.initializers import projection_initializer
from phase2_jax.model.memory_branch import MemoryBranch
from phase2_jax.model.potential import Potential
from phase2_jax.model.resolvent_branch import ResolventBranch
from phase2_jax.recompute import recomputed_module


# Of the wide hidden layer one array is stored besides what the next product reads. Where layers are unrolled, XLA would
# merge the two computations and store two more.
@jax.checkpoint
def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


class FeedForward(nnx.Module):
    """Dense → exact GELU → Dense."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        init, out_init = projection_initializer(config), projection_initializer(config, config.num_layers**-0.5)
        self.up = nnx.Linear(config.d_model, config.ffn_width, dtype=dtype, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(config.ffn_width, config.d_model, dtype=dtype, kernel_init=out_init, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x_BxNxD: jax.Array, *, deterministic: bool, rngs: nnx.Rngs | None) -> jax.Array:
        hidden_BxNxF = _gelu(stored_gradient(self.up(x_BxNxD)))
        return self.down(self.dropout(hidden_BxNxF, deterministic=deterministic, rngs=rngs))


class Block(nnx.Module):
    """x ← x + Drop(BK(LN x)); x ← x + Drop(Hebbian(LN x)); x ← x + Drop(FFN(LN x))."""

    def __init__(self, config: ModelConfig, seq_len: int, implementation: str | None, rngs: nnx.Rngs):
        self.config = config
        norm = lambda: nnx.LayerNorm(config.d_model, epsilon=1e-5, dtype=jnp.dtype(config.dtype), rngs=rngs)  # noqa: E731
        self.norm1 = norm()
        self.potential = Potential(config, seq_len, rngs)
        self.resolvent = ResolventBranch(config, implementation, rngs) if config.resolvent else None
        if config.memory:
            self.norm2 = norm()
            self.memory = MemoryBranch(config, implementation, rngs)
        else:
            self.norm2, self.memory = None, None
        self.norm3 = norm() if config.ffn_width else None
        self.ffn = FeedForward(config, rngs) if config.ffn_width else None
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        x_BxNxD: jax.Array,
        feedback_BxN: jax.Array,
        feedback_KxV: jax.Array | None,
        state: MemoryState,
        reset_BxN: jax.Array,
        *,
        aligned: bool,
        deterministic: bool,
        rngs: nnx.Rngs | None,
    ) -> tuple[jax.Array, jax.Array, MemoryState, MemoryDiagnostics, jax.Array]:
        """Run the layer.

        Args:
          x_BxNxD: residual stream.
          feedback_BxN: f of the layer below, which shifts this layer's potential.
          feedback_KxV: matrix P of the feedback for the layer above; None where there is none.
          state: of this layer's memory.
          reset_BxN, aligned, deterministic, rngs: as in `LanguageModel.__call__`.

        Returns:
          residual stream, feedback for the layer above, state, figures, and Γ `(B, N, P)` of this layer.
        """
        drop = lambda y: self.dropout(y, deterministic=deterministic, rngs=rngs)  # noqa: E731
        v_BxNxP, gamma_BxNxP, resolvent_gamma_BxNxP = self.potential(
            recomputed_module(self.norm1, x_BxNxD), feedback_BxN
        )
        if self.resolvent is not None:
            y_BxNxD, state = self.resolvent(v_BxNxP, resolvent_gamma_BxNxP, state, reset_BxN)
            x_BxNxD = x_BxNxD + drop(y_BxNxD)
        feedback_BxN = jnp.zeros_like(feedback_BxN)
        if self.memory is not None and self.norm2 is not None:
            y_BxNxD, feedback_BxN, state = self.memory(
                recomputed_module(self.norm2, x_BxNxD), gamma_BxNxP, feedback_KxV, state, reset_BxN, aligned=aligned
            )
            x_BxNxD = x_BxNxD + drop(y_BxNxD)
        else:
            state = replace(state, position=state.position + x_BxNxD.shape[1])
        if self.ffn is not None and self.norm3 is not None:
            normed_BxNxD = recomputed_module(self.norm3, x_BxNxD)
            x_BxNxD = x_BxNxD + drop(self.ffn(normed_BxNxD, deterministic=deterministic, rngs=rngs))
        return (
            x_BxNxD,
            feedback_BxN,
            state,
            diagnose(gamma_BxNxP, v_BxNxP, state, self.config.memory_config),
            gamma_BxNxP,
        )

"""The explicit state of one layer's memory."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from phase2_jax.physics import lyapunov


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MemoryState:
    """Everything a layer carries from one call to the next; float32 except `position`.

    Attributes:
      w_BxHxKxV: fast weights.
      g_re_BxP, g_im_BxP: last value of the resolvent of each of the P potentials (H, or 1 when shared).
      conv_tail_BxTxC: last inputs of the short convolution, zeros where a document began since.
      eta_factor_BxH: factor on the writes, set by SNR selection at the last consolidation.
      decay_BxH: decay Γ̄ accumulated since the last consolidation or document start.
      coherence_BxH: B_t = exp(-Γ_t dt) B_{t-1} + η‖k‖‖v‖, an upper bound of ‖W‖.
      gamma_factor_BxH: factor on Γ, set by Lyapunov homeostasis; 1 when it is off.
      lyapunov: energy bookkeeping of the running interval.
      position: tokens seen, one int32 for the whole batch; documents do not reset it.
    """

    w_BxHxKxV: jax.Array
    g_re_BxP: jax.Array
    g_im_BxP: jax.Array
    conv_tail_BxTxC: jax.Array
    eta_factor_BxH: jax.Array
    decay_BxH: jax.Array
    coherence_BxH: jax.Array
    gamma_factor_BxH: jax.Array
    lyapunov: lyapunov.LyapunovState
    position: jax.Array


def init_memory_state(
    batch: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    num_potentials: int,
    conv_tail: int,
    dtype: jnp.dtype = jnp.float32,
) -> MemoryState:
    """State before the first token: nothing stored, nothing forgotten, position 0."""
    return MemoryState(
        w_BxHxKxV=jnp.zeros((batch, num_heads, key_dim, value_dim), dtype),
        g_re_BxP=jnp.zeros((batch, num_potentials), dtype),
        g_im_BxP=jnp.zeros((batch, num_potentials), dtype),
        conv_tail_BxTxC=jnp.zeros((batch, conv_tail, num_heads * (2 * key_dim + value_dim)), dtype),
        eta_factor_BxH=jnp.ones((batch, num_heads), dtype),
        decay_BxH=jnp.zeros((batch, num_heads), dtype),
        coherence_BxH=jnp.zeros((batch, num_heads), dtype),
        gamma_factor_BxH=jnp.ones((batch, num_heads), dtype),
        lyapunov=lyapunov.init_lyapunov_state(batch, num_heads, dtype),
        position=jnp.zeros((), jnp.int32),
    )

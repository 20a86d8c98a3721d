"""The memory between two consolidations: dissipative scan, and what is linear in its writes.

    W_t = e^{-Γ_t dt} W_{t-1} + η_t k_t v_t^T,    y_t = W_t^T q_t,    f_{t,h} = ⟨P, W_{t,h}⟩

with u_t = v_t − e^{-Γ_t dt} W_{t-1}^T k_t in the place of v_t when the plasticity corrects errors (the delta rule).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels import delta_scan_with_values, hebbian_scan
from phase2_jax.memory.config import MemoryConfig
from phase2_jax.memory.state import MemoryState
from phase2_jax.recompute import recomputed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Writes:
    """What the tokens ask of the memory.

    Attributes:
      q_BxNxHxK, k_BxNxHxK, v_BxNxHxV: queries, keys and values in the compute dtype.
      log_decay_BxNxH: −Γ_t dt ≤ 0, float32.
      eta_BxNxH: write strength η_t ≥ 0, float32.
      reset_BxN: True wipes the memory before that token (a document begins).
    """

    q_BxNxHxK: jax.Array
    k_BxNxHxK: jax.Array
    v_BxNxHxV: jax.Array
    log_decay_BxNxH: jax.Array
    eta_BxNxH: jax.Array
    reset_BxN: jax.Array

    def only(self, active_N: jax.Array) -> "Writes":
        """The same tokens, of which only the active ones write, forget or reset."""
        active_1xN = active_N[None]
        return replace(
            self,
            log_decay_BxNxH=jnp.where(active_1xN[..., None], self.log_decay_BxNxH, 0),
            eta_BxNxH=jnp.where(active_1xN[..., None], self.eta_BxNxH, 0),
            reset_BxN=self.reset_BxN & active_1xN,
        )


def _store(
    writes: Writes, w_BxHxKxV: jax.Array, plasticity: str, implementation: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Readouts `(B, N, H, V)`, the weights after the last token, and the values that were written `(B, N, H, V)`."""
    arguments = (
        writes.q_BxNxHxK,
        writes.k_BxNxHxK,
        writes.v_BxNxHxV,
        writes.log_decay_BxNxH,
        writes.eta_BxNxH,
        w_BxHxKxV,
    )
    if plasticity == "delta":
        return delta_scan_with_values(*arguments, reset=writes.reset_BxN, implementation=implementation)
    return *hebbian_scan(*arguments, reset=writes.reset_BxN, implementation=implementation), writes.v_BxNxHxV


def _raised(eta_BxNxH: jax.Array, factor_BxNxH: jax.Array, plasticity: str) -> jax.Array:
    """η as consolidation raises it: η·factor, with the delta rule 1 − (1 − η)^factor for η ≤ 1."""
    if plasticity != "delta":
        return eta_BxNxH * factor_BxNxH
    # More than the whole error would overshoot; a clipped η would leave its gate without a gradient. The whole error
    # itself has an infinite logarithm.
    below_one_BxNxH = jnp.minimum(eta_BxNxH, 1 - 1e-6)
    return -jnp.expm1(factor_BxNxH * jnp.log1p(-below_one_BxNxH))


def write(
    writes: Writes, state: MemoryState, config: MemoryConfig, implementation: str | None = None
) -> tuple[jax.Array, Writes, MemoryState]:
    """Store tokens between which no consolidation falls.

    Args:
      writes: the tokens.
      state: the memory before them.
      config: which plasticity.
      implementation: of the scan, as in `pallas_kernels.hebbian_scan`.

    Returns:
      readouts `(B, N, H, V)`; what was really written: decays and strengths with the factors of the last consolidation,
        and with the delta rule its values; and the state with the weights, factors and accumulated decay after the
        last token. Its position, coherence and monitor stay as they were.
    """
    begun_BxN = jnp.cumsum(writes.reset_BxN, axis=1)
    # What the last consolidation decided holds until a new document begins.
    same_document_BxNx1 = (begun_BxN == 0)[..., None]
    eta_BxNxH = _raised(
        writes.eta_BxNxH, jnp.where(same_document_BxNx1, state.eta_factor_BxH[:, None], 1), config.plasticity
    )
    log_decay_BxNxH = writes.log_decay_BxNxH * jnp.where(same_document_BxNx1, state.gamma_factor_BxH[:, None], 1)
    written = replace(writes, log_decay_BxNxH=log_decay_BxNxH, eta_BxNxH=eta_BxNxH)
    y_BxNxHxV, w_BxHxKxV, v_BxNxHxV = _store(written, state.w_BxHxKxV, config.plasticity, implementation)
    # Without it XLA for GPUs, which lets a kernel write straight into what is kept for the backward pass, runs the
    # kernel a second time for those who read the weights now.
    w_BxHxKxV = jax.lax.optimization_barrier(w_BxHxKxV)
    last_document_BxNx1 = (begun_BxN == begun_BxN[:, -1:])[..., None]
    decay_BxH = -jnp.sum(jnp.where(last_document_BxNx1, log_decay_BxNxH, 0), axis=1)
    unbroken_Bx1 = begun_BxN[:, -1:] == 0
    return (
        y_BxNxHxV,
        replace(written, v_BxNxHxV=v_BxNxHxV),
        replace(
            state,
            w_BxHxKxV=w_BxHxKxV,
            eta_factor_BxH=jnp.where(unbroken_Bx1, state.eta_factor_BxH, 1),
            gamma_factor_BxH=jnp.where(unbroken_Bx1, state.gamma_factor_BxH, 1),
            decay_BxH=jnp.where(unbroken_Bx1, state.decay_BxH, 0) + decay_BxH,
        ),
    )


@recomputed
def _fed_back(k_BxNxHxK: jax.Array, v_BxNxHxV: jax.Array, feedback_KxV: jax.Array) -> jax.Array:
    """⟨P, k vᵀ⟩ of every token and head; of its wide products nothing is kept for the backward pass."""
    # Rounded to the compute dtype: in bfloat16 half the bytes, for an error of P's gradient of .24 % instead of .17 %.
    kp_BxNxHxV = jnp.einsum("bnhk,kv->bnhv", k_BxNxHxK, feedback_KxV.astype(k_BxNxHxK.dtype))
    return jnp.sum(kp_BxNxHxV.astype(feedback_KxV.dtype) * v_BxNxHxV.astype(feedback_KxV.dtype), axis=-1)


def overlap(feedback_KxV: jax.Array | None, w_BxHxKxV: jax.Array) -> jax.Array:
    """⟨P, W⟩ of every head, `(B, H)`; 0 without P."""
    if feedback_KxV is None:
        return jnp.zeros(w_BxHxKxV.shape[:2], w_BxHxKxV.dtype)
    return jnp.sum(feedback_KxV * w_BxHxKxV, axis=(-2, -1))


def feedback(written: Writes, start_BxH: jax.Array, feedback_KxV: jax.Array | None) -> jax.Array:
    """f = ⟨P, W⟩ at every token, mean over the heads `(B, N)`, from what `write` wrote and ⟨P, W⟩ before it; 0 without
    P.
    """
    # Not a P of zeros: XLA for CPUs (jaxlib 0.10.2 to 0.12.0) leaves the sums of a product with a constant unwritten.
    if feedback_KxV is None:
        return jnp.zeros(written.k_BxNxHxK.shape[:2], start_BxH.dtype)
    # f is linear in the writes: a memory with one key and one value follows it exactly.
    overlap_BxNxHx1 = _fed_back(written.k_BxNxHxK, written.v_BxNxHxV, feedback_KxV)[..., None]
    ones_BxNxHx1 = jnp.ones_like(overlap_BxNxHx1)
    f_BxNxHx1, _ = hebbian_scan(
        ones_BxNxHx1,
        ones_BxNxHx1,
        overlap_BxNxHx1,
        written.log_decay_BxNxH,
        written.eta_BxNxH,
        start_BxH[..., None, None],
        reset=written.reset_BxN,
    )
    return jnp.mean(f_BxNxHx1[..., 0], axis=-1)


def coherence(written: Writes, start_BxH: jax.Array) -> jax.Array:
    """B = Σ_t e^{−(Γ̄_N − Γ̄_t)} η_t ‖k_t‖ ‖v_t‖ after the last token, `(B, H)`, from B before the first; no gradient."""
    written, start_BxH = jax.lax.stop_gradient((written, start_BxH))
    dtype = start_BxH.dtype
    begun_BxN = jnp.cumsum(written.reset_BxN, axis=1)
    current_BxNx1 = (begun_BxN == begun_BxN[:, -1:])[..., None]
    log_decay_BxNxH = jnp.where(current_BxNx1, written.log_decay_BxNxH.astype(dtype), 0)
    # From each token to the end, its own decay included.
    left_BxNxH = jnp.cumsum(log_decay_BxNxH[:, ::-1], axis=1)[:, ::-1]
    after_BxNxH = jnp.pad(left_BxNxH[:, 1:], ((0, 0), (0, 1), (0, 0)))
    norm = lambda x: jnp.linalg.norm(x.astype(dtype), axis=-1)  # noqa: E731
    added_BxNxH = written.eta_BxNxH * norm(written.k_BxNxHxK) * norm(written.v_BxNxHxV)
    kept_BxH = jnp.where(begun_BxN[:, -1:] == 0, jnp.exp(left_BxNxH[:, 0]) * start_BxH, 0)
    return kept_BxH + jnp.sum(jnp.where(current_BxNx1, jnp.exp(after_BxNxH) * added_BxNxH, 0), axis=1)

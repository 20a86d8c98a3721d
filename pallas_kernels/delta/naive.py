"""The law of the error-correcting memory, one token at a time; the chunked form is tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.hebbian import naive


def scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """y, final state and the corrected values u of u_t = v_t - exp(log_decay_t) W_{t-1}^T k_t, by lax.scan.

    W_t = exp(log_decay_t) W_{t-1} + eta_t k_t u_t^T and y_t = W_t^T q_t. Computes in the state's dtype; y and u come
    back in v's.
    """

    def body(state, xs):
        q, k, v, log_decay, eta, reset = xs
        kept = jnp.exp(log_decay)[..., None, None] * state
        if reset is not None:
            kept = jnp.where(reset[:, None, None, None], 0, kept)
        known = jnp.einsum("bhk,bhkv->bhv", k.astype(state.dtype), kept, precision=jax.lax.Precision.HIGHEST)
        # Rounded before the write, so that it is the value that a Hebbian memory is given.
        u = (v.astype(state.dtype) - known).astype(v.dtype)
        y, state = naive.step(q, k, u, log_decay, eta, state, reset)
        return state, (y, u)

    arrays = (q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN)
    tokens_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays)
    state, results = jax.lax.scan(body, initial_state_BxHxKxV, tokens_first)
    y_BxNxHxV, u_BxNxHxV = (jnp.moveaxis(x, 0, 1) for x in results)
    return y_BxNxHxV, state, u_BxNxHxV

"""The law of the Hebbian memory, one token at a time; every other implementation is tested against it."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def step(
    q_BxHxK: jax.Array,
    k_BxHxK: jax.Array,
    v_BxHxV: jax.Array,
    log_decay_BxH: jax.Array,
    eta_BxH: jax.Array,
    state_BxHxKxV: jax.Array,
    reset_B: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Decay (or wipe), write, read. Computes in the state's dtype; y comes back in v's."""
    dtype = state_BxHxKxV.dtype
    q, k, v = (x.astype(dtype) for x in (q_BxHxK, k_BxHxK, v_BxHxV))
    kept = jnp.exp(log_decay_BxH)[..., None, None] * state_BxHxKxV
    if reset_B is not None:
        kept = jnp.where(reset_B[:, None, None, None], 0, kept)
    written = (eta_BxH[..., None] * k)[..., :, None] * v[..., None, :]
    state = kept + written
    y = jnp.einsum("bhk,bhkv->bhv", q, state, precision=jax.lax.Precision.HIGHEST)
    return y.astype(v_BxHxV.dtype), state


def scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """W_t = exp(log_decay_t) W_{t-1} + eta_t k_t v_t^T and y_t = W_t^T q_t, by lax.scan over the tokens."""

    def body(state, xs):
        q, k, v, log_decay, eta, reset = xs
        y, state = step(q, k, v, log_decay, eta, state, reset)
        return state, y

    arrays = (q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, reset_BxN)
    tokens_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays)
    state, y_NxBxHxV = jax.lax.scan(body, initial_state_BxHxKxV, tokens_first)
    return jnp.moveaxis(y_NxBxHxV, 0, 1), state

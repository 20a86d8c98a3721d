"""Hebbian scan for states of a few numbers (K V small): a first-order linear recurrence, all chunks side by side.

Here the dense products of the chunked form would cost C per token to move one number; this form keeps every W_t, which
is cheap as long as K V is, and does O(1) work per number. The recurrence h_t = exp(a_t) h_{t-1} + b_t has its own
backward: the same recurrence run from the end. It alone is not elementwise, and may be that of a kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp

from pallas_kernels.chunking import from_lanes, lane_chunk_length, pad_tokens, to_lanes, walk
from pallas_kernels.hebbian.decays import decayed

# Largest K V for which this form is the faster one (measured on CPU).
LARGEST_STATE = 16

# As `recurrence`.
Recurrence = Callable[[jax.Array, jax.Array | None, jax.Array, jax.Array | None, bool], jax.Array]


def _keep(log_decay, cut, state):
    """The part of state (..., K, V) that is left after the decays (...), nothing where cut."""
    kept = decayed(log_decay[..., None, None], state)
    return kept if cut is None else jnp.where(cut[..., None, None], 0, kept)


def _walk_chunks(log_decay, cut, added, reverse: bool):
    """Inside the chunks (C first): the recurrence from zero, and log decay and cut from the entry to each position."""

    def body(carry, xs):
        state, log_fade, gone = carry
        log_decay_t, cut_t, added_t = xs
        state = _keep(log_decay_t, cut_t, state) + added_t
        carry = (state, log_fade + log_decay_t, None if cut_t is None else gone | cut_t)
        return carry, carry

    start = jax.tree.map(lambda x: jnp.zeros_like(x[0]), (added, log_decay, cut))
    _, walked = walk(body, start, (log_decay, cut, added), reverse=reverse)
    return walked


def _following(x_BxNxH: jax.Array) -> jax.Array:
    """That of the next token, nothing after the last."""
    return jnp.pad(x_BxNxH[:, 1:], ((0, 0), (0, 1), (0, 0)))


def recurrence(
    log_decay_BxNxH: jax.Array,
    cut_BxNx1: jax.Array | None,
    added_BxNxHxKxV: jax.Array,
    initial_BxHxKxV: jax.Array | None,
    reverse: bool,
) -> jax.Array:
    """h_t = exp(log_decay_t) h_{t-1} + added_t for all t (B, N, H, K, V), nothing being kept of h_{t-1} at a cut.

    In reverse its transpose: h_t = added_t and what token t + 1 keeps of h_{t+1}. initial, or zero for None, comes
    before the first token, in reverse after the last, which keeps all of it.
    """
    if reverse:
        log_decay_BxNxH = _following(log_decay_BxNxH)
        cut_BxNx1 = None if cut_BxNx1 is None else _following(cut_BxNx1)
    if initial_BxHxKxV is None:
        initial_BxHxKxV = jnp.zeros_like(added_BxNxHxKxV[:, 0])
    num_tokens = log_decay_BxNxH.shape[1]
    chunk = lane_chunk_length(num_tokens)
    lanes = jax.tree.map(lambda x: to_lanes(pad_tokens(x, chunk), chunk), (log_decay_BxNxH, cut_BxNx1, added_BxNxHxKxV))
    local, log_fade, gone = _walk_chunks(lanes[0], lanes[1], lanes[2], reverse)
    last = 0 if reverse else -1

    def across(state, xs):
        local_m, log_fade_m, gone_m = xs
        return _keep(log_fade_m, gone_m, state) + local_m, state

    chunks_first = jax.tree.map(lambda x: jnp.moveaxis(x[last], 1, 0), (local, log_fade, gone))
    _, entries = walk(across, initial_BxHxKxV, chunks_first, reverse=reverse)
    states = local + _keep(log_fade, gone, jnp.moveaxis(entries, 0, 1))
    return from_lanes(states, num_tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _states(log_decay_BxNxH, cut_BxNx1, added_BxNxHxKxV, initial_BxHxKxV, recurrence: Recurrence):
    return recurrence(log_decay_BxNxH, cut_BxNx1, added_BxNxHxKxV, initial_BxHxKxV, False)


def _states_fwd(log_decay, cut, added, initial, recurrence: Recurrence):
    states = _states(log_decay, cut, added, initial, recurrence)
    return states, (log_decay, cut, states, initial)


def _states_bwd(recurrence: Recurrence, residuals, cotangent):
    log_decay, cut, states, initial = residuals
    lam = recurrence(log_decay, cut, cotangent, None, True)
    before = jnp.concatenate([initial[:, None], states[:, :-1]], axis=1)
    kept = jnp.exp(log_decay) if cut is None else jnp.where(cut, 0, jnp.exp(log_decay))
    dlog_decay = kept * jnp.sum(lam * before, axis=(-2, -1))
    return dlog_decay, None, lam, kept[:, 0, :, None, None] * lam[:, 0]


_states.defvjp(_states_fwd, _states_bwd)


def scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
    *,
    recurrence: Recurrence = recurrence,
) -> tuple[jax.Array, jax.Array]:
    """The Hebbian scan through all its states; arguments and result as naive.scan."""
    dtype = initial_state_BxHxKxV.dtype
    q, k, v = (x.astype(dtype) for x in (q_BxNxHxK, k_BxNxHxK, v_BxNxHxV))
    written = (eta_BxNxH[..., None] * k)[..., :, None] * v[..., None, :]
    cut = None if reset_BxN is None else reset_BxN[..., None]
    states = cast(jax.Array, _states(log_decay_BxNxH, cut, written, initial_state_BxHxKxV, recurrence))
    y = jnp.sum(q[..., :, None] * states, axis=-2)
    return y.astype(v_BxNxHxV.dtype), states[:, -1]

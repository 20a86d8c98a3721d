"""Heads wider than the tiles of a kernel: every part of the keys with every part of the values is a head of its own.

W = [W_ad] in parts, y_d = sum_a W_ad^T q_a: readouts add up along the keys, and no part needs another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def _split(x: jax.Array, axis: int, widest: int) -> list[jax.Array]:
    """Equal parts of at most widest along axis, with zeros at the end where they do not divide it."""
    parts = -(-x.shape[axis] // widest)
    missing = [(0, 0)] * x.ndim
    missing[axis] = (0, -x.shape[axis] % parts)
    return jnp.split(jnp.pad(x, missing), parts, axis)


def scan(
    q_BxNxHxK: jax.Array,
    k_BxNxHxK: jax.Array,
    v_BxNxHxV: jax.Array,
    log_decay_BxNxH: jax.Array,
    eta_BxNxH: jax.Array,
    initial_state_BxHxKxV: jax.Array,
    reset_BxN: jax.Array | None,
    *,
    narrow_scan: Callable[..., tuple[jax.Array, jax.Array]],
    widest: int,
) -> tuple[jax.Array, jax.Array]:
    """The Hebbian scan by narrow_scan, which takes K and V up to widest; arguments and results as naive.scan.

    Parts of a readout are of v's dtype before they are added.
    """
    keys, values = initial_state_BxHxKxV.shape[2:]
    if max(keys, values) <= widest:
        return narrow_scan(
            q_BxNxHxK, k_BxNxHxK, v_BxNxHxV, log_decay_BxNxH, eta_BxNxH, initial_state_BxHxKxV, reset_BxN
        )
    q_A, k_A, v_D = (_split(x, 3, widest) for x in (q_BxNxHxK, k_BxNxHxK, v_BxNxHxV))
    state_AxD = [_split(rows, 3, widest) for rows in _split(initial_state_BxHxKxV, 2, widest)]
    pairs = list(itertools.product(range(len(q_A)), range(len(v_D))))
    y, final = narrow_scan(
        jnp.concatenate([q_A[a] for a, _ in pairs], axis=2),
        jnp.concatenate([k_A[a] for a, _ in pairs], axis=2),
        jnp.concatenate([v_D[d] for _, d in pairs], axis=2),
        jnp.concatenate([log_decay_BxNxH] * len(pairs), axis=2),
        jnp.concatenate([eta_BxNxH] * len(pairs), axis=2),
        jnp.concatenate([state_AxD[a][d] for a, d in pairs], axis=1),
        reset_BxN,
    )
    y_of = dict(zip(pairs, jnp.split(y, len(pairs), axis=2), strict=True))
    final_of = dict(zip(pairs, jnp.split(final, len(pairs), axis=1), strict=True))
    y = jnp.concatenate([sum(y_of[a, d] for a in range(len(q_A))) for d in range(len(v_D))], axis=3)
    rows = [jnp.concatenate([final_of[a, d] for d in range(len(v_D))], axis=3) for a in range(len(q_A))]
    return y[..., :values], jnp.concatenate(rows, axis=2)[:, :, :keys, :values]

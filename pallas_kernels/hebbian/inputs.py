"""The arguments of a Hebbian scan, as the forms with a hand-written backward pass them around."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Inputs(NamedTuple):
    """q, k (B, N, H, K), v (B, N, H, V), log_decay, eta (B, N, H), reset (B, N) or None."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array
    eta: jax.Array
    reset: jax.Array | None

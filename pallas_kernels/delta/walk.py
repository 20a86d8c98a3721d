"""The walk of the delta rule from chunk to chunk, the only part of it that is sequential, forward and back.

With read and write (C, K) of a chunk and the state S (K, V) before it,
    x = added - read S,    S <- keep S + write^T x
and back from the last chunk, where S is the cotangent of the state after the chunk and `joining` enters before it,
    x = added + write S,   S <- keep S - read^T x + joining.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hebbian.decays import decayed
from pallas_kernels.products import product


class Steps(NamedTuple):
    """M chunks of C tokens, in the state's dtype.

    added (B, H, M, C, V), read and write (B, H, M, C, K); log_whole (B, H, M): log decay over the chunk; survives
    (B, M): whether what comes from before the chunk reaches its end, None where all does; joining (B, H, M, K, V) on
    the way back, None forward.
    """

    added: jax.Array
    read: jax.Array
    write: jax.Array
    log_whole: jax.Array
    survives: jax.Array | None
    joining: jax.Array | None = None


# Steps, S (B, H, K, V) before the first step and the dtype that x is rounded to before it is written, to x
# (B, H, M, C, V) in that dtype, S before every step (B, H, M, K, V) and S after the last.
Walk = Callable[[Steps, jax.Array, jnp.dtype], tuple[jax.Array, jax.Array, jax.Array]]


def plain(steps: Steps, start: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A `Walk`; back where there is something joining."""
    back = steps.joining is not None

    def body(state, chunk: Steps):
        first, second, sign = (chunk.write, chunk.read, -1) if back else (chunk.read, chunk.write, 1)
        x = (chunk.added - sign * product("bhik,bhkv->bhiv", first, state)).astype(dtype)
        kept = decayed(chunk.log_whole[..., None, None], state)
        if chunk.survives is not None:
            kept = jnp.where(chunk.survives[:, None, None, None], kept, 0)
        after = kept + sign * product("bhik,bhiv->bhkv", second, x.astype(state.dtype))
        return after if chunk.joining is None else after + chunk.joining, (x, state)

    survives = steps.survives
    chunks_first = jax.tree.map(lambda a: jnp.moveaxis(a, 2, 0), steps._replace(survives=None))
    chunks_first = chunks_first._replace(survives=None if survives is None else survives.T)
    end, (x, states) = jax.lax.scan(body, start, chunks_first, reverse=back)
    return jnp.moveaxis(x, 0, 2), jnp.moveaxis(states, 0, 2), end

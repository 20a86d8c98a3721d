"""vmap of functions that run kernels: the mapped axis joins the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, whose arguments and results are trees of arrays (B, ...), such that vmap runs it once on more rows.

    Kernels have no batching rule of their own. An argument that is not mapped is repeated. Nested maps fold one after
    the other. Not to be differentiated: it belongs inside the rules of a `jax.custom_vjp`.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    def fold(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        def join(batched: bool, x: jax.Array) -> jax.Array:
            every = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return every.reshape(axis_size * every.shape[1], *every.shape[2:])

        rows = jax.tree.map(join, tuple(in_batched), arguments)
        results = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), mapped(*rows))
        return results, jax.tree.map(lambda _: True, results)

    mapped.def_vmap(fold)
    return mapped

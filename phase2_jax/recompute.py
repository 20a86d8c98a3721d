"""What the backward pass computes again instead of keeping it from the forward pass."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

# For elementwise functions and norms, whose inputs are kept anyway, that is cheaper than storing what they compute on
# the way. Inside lax.scan nothing can be merged with the forward pass; where layers are unrolled XLA may, and a step of
# the base preset moves 2 % less for it.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def recomputed_module(module: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """module(x), of which only x is kept for the backward pass."""
    graphdef, params = nnx.split(module)
    return recomputed(lambda params, x: nnx.merge(graphdef, params)(x))(params, x)

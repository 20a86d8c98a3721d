"""Hints for the compiler that cost nothing in the mathematics."""

import functools
from collections.abc import Callable

import jax
from flax import nnx

# What a function computes on the way is not kept for the backward pass but computed again: for elementwise functions
# and norms, whose inputs are kept anyway, that is cheaper than storing it. Layers and pieces of a stream run inside
# lax.scan, where nothing can be merged with the forward pass.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


def recomputed_module(module: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """module(x), of which only x is kept for the backward pass."""
    graphdef, params = nnx.split(module)
    return recomputed(lambda params, x: nnx.merge(graphdef, params)(x))(params, x)


@jax.custom_vjp
def stored_gradient(x: jax.Array) -> jax.Array:
    """x itself; in the backward pass its cotangent is computed once and stored.

    The cotangent of a projection's output is read by two products. Without this, XLA for CPUs merges the activation's
    derivative into each of them and evaluates it twice, once in a transposed order that misses the caches.
    """
    return x


def _forward(x):
    return x, None


def _backward(_, dx):
    return (jax.lax.optimization_barrier(dx),)


stored_gradient.defvjp(_forward, _backward)

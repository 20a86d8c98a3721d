"""A hint for the compiler that costs nothing in the mathematics."""

import jax


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

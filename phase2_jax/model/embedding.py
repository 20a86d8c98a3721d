"""Rows of an embedding table, with a gradient that a GPU adds up without atomics."""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

# Tokens whose one-hot vectors exist at a time.
_BLOCK = 8192


def look_up(table_VxD: jax.Array, tokens_BxN: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The tokens' rows `(B, N, D)`, rounded to `dtype` after they are taken.

    Text repeats its tokens, so on a GPU a scatter of the gradient adds to few rows with colliding atomics: half a
    second for 65,536 tokens that are mostly one filler. There it is a product with one-hot vectors instead, which also
    gives the same bits every time.
    """
    return cast(jax.Array, _look_up(table_VxD, tokens_BxN, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table_VxD: jax.Array, tokens_BxN: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return table_VxD[tokens_BxN].astype(dtype)


def _forward(table_VxD: jax.Array, tokens_BxN: jax.Array, dtype: jnp.dtype):
    return _look_up(table_VxD, tokens_BxN, dtype), (tokens_BxN, jnp.zeros((table_VxD.shape[0], 0), table_VxD.dtype))


def _scattered(tokens_T: jax.Array, dx_TxD: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.zeros((like.shape[0], dx_TxD.shape[1]), like.dtype).at[tokens_T].add(dx_TxD.astype(like.dtype))


def summed_by_products(tokens_T: jax.Array, dx_TxD: jax.Array, like: jax.Array) -> jax.Array:
    """Sum of the rows of dx that share a token, `(V, D)` in the dtype of `like` `(V, 0)`, block by block."""
    block = min(_BLOCK, tokens_T.size)
    missing = -tokens_T.size % block
    # A token that does not exist has no one.
    tokens_MxT = jnp.pad(tokens_T, (0, missing), constant_values=-1).reshape(-1, block)
    dx_MxTxD = jnp.pad(dx_TxD, ((0, missing), (0, 0))).reshape(-1, block, dx_TxD.shape[1])

    def add(total_VxD, xs):
        tokens_T, dx_TxD = xs
        one_hot_TxV = jax.nn.one_hot(tokens_T, like.shape[0], dtype=dx_TxD.dtype)
        product_VxD = jnp.einsum(
            "tv,td->vd", one_hot_TxV, dx_TxD, precision="highest", preferred_element_type=like.dtype
        )
        return total_VxD + product_VxD, None

    start = jnp.zeros((like.shape[0], dx_TxD.shape[1]), like.dtype)
    return jax.lax.scan(add, start, (tokens_MxT, dx_MxTxD))[0]


def _backward(dtype: jnp.dtype, residuals, dx_BxNxD: jax.Array):
    del dtype
    tokens_BxN, like = residuals
    tokens_T, dx_TxD = tokens_BxN.reshape(-1), dx_BxNxD.reshape(-1, dx_BxNxD.shape[-1])
    dtable_VxD = jax.lax.platform_dependent(tokens_T, dx_TxD, like, cpu=_scattered, default=summed_by_products)
    return dtable_VxD, None


_look_up.defvjp(_forward, _backward)

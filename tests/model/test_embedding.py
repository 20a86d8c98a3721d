"""The embedding's rows and the two ways to add up their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phase2_jax.model import embedding


def draws(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    table_VxD = jax.random.normal(keys[0], (11, 4))
    # Mostly one token, as in tasks with fillers.
    tokens_BxN = jnp.where(jax.random.uniform(keys[1], (3, 50)) < 0.7, 0, jax.random.randint(keys[1], (3, 50), 0, 11))
    return table_VxD, tokens_BxN, jax.random.normal(keys[2], (3, 50, 4)).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_rows_and_gradient_are_those_of_an_index(dtype):
    table_VxD, tokens_BxN, dx_BxNxD = draws(dtype)
    rows, pullback = jax.vjp(lambda table: embedding.look_up(table, tokens_BxN, jnp.dtype(dtype)), table_VxD)
    np.testing.assert_array_equal(rows, table_VxD[tokens_BxN].astype(dtype))
    assert rows.dtype == dtype
    expected = np.zeros((11, 4))
    np.add.at(expected, np.asarray(tokens_BxN), np.asarray(dx_BxNxD, np.float64))
    # Float32 sums of up to 105 terms of size 1.
    np.testing.assert_allclose(pullback(dx_BxNxD)[0], expected, atol=1e-4)


@pytest.mark.parametrize("block", [7, 1024])
def test_products_give_the_sums_of_the_scatter(monkeypatch, block):
    monkeypatch.setattr(embedding, "_BLOCK", block)
    _, tokens_BxN, dx_BxNxD = draws(jnp.bfloat16)
    like = jnp.zeros((11, 0))
    arguments = tokens_BxN.reshape(-1), dx_BxNxD.reshape(-1, 4), like
    # Both add the same bfloat16 numbers in float32, in another order.
    np.testing.assert_allclose(embedding.summed_by_products(*arguments), embedding._scattered(*arguments), atol=1e-4)

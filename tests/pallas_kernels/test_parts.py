"""Wide heads in parts, against the law."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hebbian import naive, parts


# (K, V): narrow enough, parts of keys, of values, of both; parts that the widths are and are not multiples of.
@pytest.mark.parametrize("widths", [(4, 3), (8, 4), (3, 12), (10, 7), (9, 5)])
@pytest.mark.parametrize("resets", [False, True])
def test_results_and_all_gradients_are_those_of_the_law(widths, resets):
    rng = np.random.default_rng(0)
    (keys, values), sizes, seen = widths, (2, 9, 3), []
    reset = jnp.asarray(rng.random(sizes[:2]) < 0.2) if resets else None

    def narrow_scan(*arguments):
        seen.append(arguments[0].shape[-1:] + arguments[2].shape[-1:])
        return naive.scan(*arguments)

    def with_gradients(scan, arguments, cotangents):
        results, pullback = jax.vjp(functools.partial(scan, reset_BxN=reset), *arguments)
        return results, pullback(cotangents)

    with jax.enable_x64(True):
        vectors = [jnp.asarray(rng.normal(size=(*sizes, width))) for width in (keys, keys, values)]
        gates = [jnp.asarray(-np.abs(rng.normal(size=sizes))), jnp.asarray(rng.normal(size=sizes))]
        initial = jnp.asarray(rng.normal(size=(2, 3, keys, values)))
        cotangents = (jnp.asarray(rng.normal(size=(*sizes, values))), initial[::-1] + 1)
        by_parts = functools.partial(parts.scan, narrow_scan=narrow_scan, widest=4)
        found = with_gradients(by_parts, (*vectors, *gates, initial), cotangents)
        expected = with_gradients(naive.scan, (*vectors, *gates, initial), cotangents)
    assert max(seen[0]) <= 4
    # The same sums in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), found, expected)

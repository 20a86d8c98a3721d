"""The resolvent scan's passes for GPUs, in plain JAX, against the law in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import resolvent_scan
from pallas_kernels.resolvent import chunked, lanes, naive, tiled

scan = functools.partial(lanes.scan, backend=tiled.BACKEND)
diagonal = functools.partial(chunked.diagonal, causal=scan)


def make_inputs(rng, num_tokens, damping, *, batch=2, heads=3):
    """((x, u, initial g), cotangents): couplings of either sign where the damping is strong, cuts in between."""
    shape = (batch, num_tokens, heads)
    x = rng.normal(size=shape), -damping * rng.uniform(0.5, 1.5, size=shape)
    u = rng.uniform(-1.5 if damping >= 1 else 0, 1.5, size=shape) * (rng.random((batch, num_tokens, 1)) > 0.03)
    initial = rng.normal(size=(batch, heads)), np.abs(rng.normal(size=(batch, heads)))
    cotangent = rng.normal(size=shape), rng.normal(size=shape)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), ((x, u, initial), cotangent))


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, arguments, cotangent):
    g, pullback = jax.vjp(function, *arguments)
    return g, pullback(cotangent)


def errors(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return [np.linalg.norm(np.asarray(a, np.float64) - b) / max(np.linalg.norm(b), 1e-30) for a, b in pairs]


def test_chunks_are_whole_steps_and_not_too_many():
    for num_tokens in (1, 7, 8, 67, 16_384, 33_000, 1_048_576):
        chunk = lanes.chunk_length(num_tokens)
        assert chunk % lanes.STEP == 0
        assert -(-num_tokens // chunk) <= 1024
    assert lanes.chunk_length(16_384) == 32


# Tokens: one, less than a step, many chunks.
@pytest.mark.parametrize("num_tokens", [1, 7, 330])
def test_values_and_every_gradient_are_those_of_the_law(num_tokens):
    arguments = make_inputs(np.random.default_rng(0), num_tokens, 0.1, batch=1)
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
        found, expected = (with_gradients(function, *arguments) for function in (scan, naive.scan))
        assert max(errors(found, expected)) < 1e-12


@pytest.mark.parametrize("num_tokens", [1, 67])
def test_the_diagonal_is_that_of_the_law(num_tokens):
    (x, u, _), cotangent = make_inputs(np.random.default_rng(1), num_tokens, 0.1)
    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), ((x, u), cotangent))
        found, expected = (with_gradients(function, *arguments) for function in (diagonal, naive.diagonal))
        assert max(errors(found, expected)) < 1e-12


@pytest.mark.parametrize("damping", [1e6, 1.0, 1e-3])
def test_float32_is_as_good_as_the_plain_recursion(damping):
    arguments = make_inputs(np.random.default_rng(2), 330, damping)
    single = (with_gradients(function, *arguments) for function in (scan, naive.scan))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), arguments)
        exact = jax.tree.map(np.asarray, with_gradients(naive.scan, *wide))
    ours, plain = (errors(found, exact) for found in single)
    # Rounding is amplified by |g|, up to 1 / damping, in any order of operations; the order only reshuffles it.
    assert max(ours) < 4 * max(plain) + 1e-6


@functools.partial(jax.jit, static_argnums=0)
def gradients_of_the_sum(function, x, u):
    def loss(x, u):
        zero = jnp.zeros((1, 2), jnp.float32)
        g = function(x, u, (zero, zero))
        return jnp.sum(g[0]) + jnp.sum(g[1]), g

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, u)


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-40, 1.0, 1e4, 1e15]),
    damping=st.lists(st.sampled_from([1e-2, 0.5, 1e3, 1e12]), min_size=1, max_size=4),
    coupling=st.lists(st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 3.0, 1e3]), min_size=1, max_size=4),
)
def test_bounded_and_finite_for_any_input(seed, scale, damping, coupling):
    rng = np.random.default_rng(seed)
    shape = (1, 67, 2)
    rates = rng.choice(damping, size=shape)
    x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (rng.normal(size=shape) * scale, -rates))
    gradient, g = gradients_of_the_sum(scan, x, jnp.asarray(rng.choice(coupling, size=shape), jnp.float32))
    size = np.hypot(*(np.asarray(part, np.float64) for part in g))
    # The bound holds for the rounded denominator; its reciprocal rounds three more times.
    assert (size * rates <= 1 + 1e-6).all()
    assert all(bool(jnp.isfinite(part).all()) for part in jax.tree.leaves(gradient))


def launched(x, u, initial_g, chunk):
    """A kernel's stand-in: nothing inside can be mapped over."""

    @jax.custom_batching.custom_vmap
    def passes(x, u, initial_g):
        return tiled.forward(x, u, initial_g, chunk)

    @passes.def_vmap
    def refuse(axis_size, in_batched, x, u, initial_g):
        raise AssertionError("a kernel cannot be mapped over")

    return passes(x, u, initial_g)


def test_a_map_over_it_joins_the_batch():
    rng = np.random.default_rng(3)
    (x, u, initial), cotangent = jax.tree.map(
        lambda *parts: jnp.stack(parts), *(make_inputs(rng, 67, 0.1) for _ in range(3))
    )

    def gradients(function, x, u, initial, cotangent):
        g, pullback = jax.vjp(jax.checkpoint(function), x, u, initial)
        return g, pullback(cotangent)

    opaque = lanes.Backend(launched, tiled.BACKEND.backward)
    found, expected = (
        jax.jit(jax.vmap(functools.partial(gradients, function), in_axes=(0, 0, None, 0)))(
            x, u, (initial[0][0], initial[1][0]), cotangent
        )
        for function in (functools.partial(lanes.scan, backend=opaque), naive.scan)
    )
    # Rounding of float32, amplified by |g| up to 10.
    assert max(errors(found, expected)) < 1e-5


def test_the_kernel_says_why_it_cannot_run_here():
    v, head = jnp.ones((1, 4, 1)), jnp.ones(1)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU from sm_80"):
        resolvent_scan(v, v, head, head, head, implementation="triton")
    with jax.enable_x64(True), pytest.raises(ValueError, match="computes in float32, not float64"):
        resolvent_scan(v.astype(jnp.float64), v, head, head, head, implementation="triton")

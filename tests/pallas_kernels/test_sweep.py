"""The fused form of the Hebbian scan, through the tiles that the GPU kernels share, against the law in float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import hebbian_scan
from pallas_kernels.hebbian import naive, sweep, tiled


def relative(x, reference) -> float:
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))


# Rates from memories longer than the sequence to forgetting within a token; segments of 4 chunks, or one.
@pytest.mark.parametrize(
    ("num_tokens", "segment", "dtype", "rate", "resets"),
    [
        (1, 4, jnp.float32, 0.1, False),
        (300, 4, jnp.float32, 0.01, True),
        (640, 4, jnp.bfloat16, 1e-3, True),
        (640, 100, jnp.bfloat16, 5.0, False),
    ],
)
def test_results_and_all_gradients(num_tokens, segment, dtype, rate, resets):
    rng = np.random.default_rng(0)
    shapes = [(2, num_tokens, 2, 8), (2, num_tokens, 2, 8), (2, num_tokens, 2, 16)]
    vectors = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    log_decay = jnp.asarray(-rate * np.abs(rng.normal(size=(2, num_tokens, 2))), jnp.float32)
    eta = jnp.asarray(rng.normal(size=(2, num_tokens, 2)), jnp.float32)
    initial = jnp.asarray(rng.normal(size=(2, 2, 8, 16)), jnp.float32)
    reset = jnp.asarray(rng.random((2, num_tokens)) < 0.02) if resets else None
    arguments = (*vectors, log_decay, eta, initial)
    cotangents = (
        jnp.asarray(rng.normal(size=shapes[2]), dtype),
        jnp.asarray(rng.normal(size=initial.shape), jnp.float32),
    )

    def fused(arguments, cotangents):
        results, pullback = jax.vjp(
            functools.partial(sweep.scan, reset_BxN=reset, fused=tiled.fused(segment)), *arguments
        )
        return results, pullback(cotangents)

    found = jax.jit(fused)(arguments, cotangents)
    with jax.enable_x64(True):

        def law(arguments, cotangents):
            results, pullback = jax.vjp(functools.partial(naive.scan, reset_BxN=reset), *arguments)
            return results, pullback(cotangents)

        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
        expected = jax.tree.map(np.asarray, jax.jit(law)(*wide))
    # Roundings of bfloat16 operands are 2e-3 each; float32 sums err by their length in units of 6e-8.
    bound = 5e-3 if dtype == jnp.bfloat16 else 1e-6
    for name, x, reference in zip(
        ("y", "final", "dq", "dk", "dv", "dlog_decay", "deta", "dinitial"),
        jax.tree.leaves(found),
        jax.tree.leaves(expected),
        strict=True,
    ):
        assert relative(x, reference) < bound, name
    if reset is not None:
        # A decay that a reset overrides is not used: exactly nothing, as every path across it has a factor of zero.
        assert not np.any(np.asarray(found[1][3])[np.asarray(reset)])


# Total log2 decays of a chunk: nearly none, just inside the range of the factored form, beyond it, and far beyond.
@pytest.mark.parametrize("total", [0.1, 47.0, 90.0, 400.0])
def test_huge_inputs_stay_finite(total):
    rng = np.random.default_rng(0)
    sizes = (1, 200, 1)
    q, k, v, dy = (jnp.asarray(2.0**20 * rng.normal(size=(*sizes, 8)), jnp.bfloat16) for _ in range(4))
    log_decay = jnp.full(sizes, -total / 64 * np.log(2), jnp.float32)
    eta, initial = jnp.ones(sizes, jnp.float32), jnp.asarray(2.0**40 * rng.normal(size=(1, 1, 8, 8)), jnp.float32)

    def with_gradients(scan, arguments, cotangents):
        results, pullback = jax.vjp(scan, *arguments)
        return results, pullback(cotangents)

    scan = functools.partial(sweep.scan, reset_BxN=None, fused=tiled.fused(100))
    arguments, cotangents = (q, k, v, log_decay, eta, initial), (dy, initial)
    found = jax.jit(functools.partial(with_gradients, scan))(arguments, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
        law = functools.partial(with_gradients, functools.partial(naive.scan, reset_BxN=None))
        expected = jax.tree.leaves(jax.tree.map(np.asarray, jax.jit(law)(*wide)))
    for x, reference in zip(jax.tree.leaves(found), expected, strict=True):
        # The law's results are far inside float32; roundings of bfloat16 operands are 2e-3 each.
        assert np.abs(reference).max() < 2.0**120
        assert relative(x, reference) < 5e-3


def behind_a_wall(compute):
    """compute(arrays..., gates, plan) as a kernel is to JAX: nothing inside is mapped over or differentiated."""

    def walled(*arguments):
        *static, operands, gates, plan = arguments

        @jax.custom_batching.custom_vmap
        def kernel(operands, gates):
            return compute(*static, operands, gates, plan)

        @kernel.def_vmap
        def refuse(axis_size, in_batched, operands, gates):
            raise AssertionError("a kernel cannot be mapped over")

        return kernel(operands, gates)

    return walled


TILED = tiled.fused(4)
OPAQUE = dataclasses.replace(TILED, forward=behind_a_wall(TILED.forward), backward=behind_a_wall(TILED.backward))


def mapped(scan, q, k, v, log_decay, eta, initial):
    """Over a first axis of all but eta and the initial state; k is mapped along its second axis."""
    return jax.vmap(scan, in_axes=(0, 1, 0, 0, None, None))(q, jnp.moveaxis(k, 0, 1), v, log_decay, eta, initial)


def twice_mapped(scan, *arguments):
    one = jax.vmap(scan, in_axes=(None, 0, None, None, None, None))
    return mapped(lambda q, k, *rest: one(q, jnp.stack([k, k / 2]), *rest), *arguments)


def scanned(scan, q, k, v, log_decay, eta, initial):
    """Layers of a lax.scan with rematerialisation, the memory carried along."""

    def layer(state, xs):
        y, state = jax.checkpoint(scan)(*xs, eta, state)
        return state, y

    state, y = jax.lax.scan(layer, initial, (q, k, v, log_decay))
    return y, state


def mapped_and_scanned(scan, q, k, v, log_decay, eta, initial):
    initials = jnp.stack([initial, 2 * initial])
    return jax.vmap(lambda initial: scanned(scan, q, k, v, log_decay, eta, initial))(initials)


def gradients_of_the_mapped(transform, scan, *arguments):
    def loss(*arguments):
        return sum(jnp.sum(jnp.sin(x)) for x in transform(scan, *arguments))

    return jax.grad(loss, argnums=tuple(range(6)))(*arguments)


def mapped_gradients(scan, *arguments):
    def gradients(*arguments):
        return gradients_of_the_mapped(lambda scan, *a: scan(*a), scan, *arguments)

    return mapped(gradients, *arguments)


def mapped_pullback(scan, q, k, v, log_decay, eta, initial):
    """Several cotangents of one scan, as for a Jacobian."""
    (y, final), pullback = jax.vjp(scan, q[0], k[0], v[0], log_decay[0], eta, initial)
    return jax.vmap(pullback)((jnp.stack([y, jnp.cos(y)]), jnp.stack([final, 1 - final])))


@pytest.mark.parametrize(
    "compute",
    [
        mapped,
        twice_mapped,
        mapped_and_scanned,
        mapped_gradients,
        mapped_pullback,
        *(
            pytest.param(
                functools.partial(gradients_of_the_mapped, transform),
                id=f"gradients_of_{transform.__name__}",
                marks=[] if transform is mapped_and_scanned else pytest.mark.slow,
            )
            for transform in (mapped, twice_mapped, scanned, mapped_and_scanned)
        ),
    ],
)
def test_transformations_reach_kernels_that_have_no_rules(compute):
    rng = np.random.default_rng(0)
    rows, num_tokens = (3, 2), 300
    shapes = [(*rows, num_tokens, 2, 4)] * 3 + [(*rows, num_tokens, 2), (2, num_tokens, 2), (2, 2, 4, 4)]
    arguments = [jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for shape in shapes]
    arguments[3] = -jnp.abs(arguments[3])
    reset = jnp.asarray(rng.random((2, num_tokens)) < 0.02)
    scans = (functools.partial(sweep.scan, fused=OPAQUE), naive.scan)
    found, expected = (
        jax.jit(functools.partial(compute, functools.partial(scan, reset_BxN=reset)))(*arguments) for scan in scans
    )
    # Both in float32, some hundred terms added in another order.
    for x, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.shape == reference.shape
        assert relative(x, reference) < 3e-6


@pytest.mark.parametrize(("name", "needed"), [("mosaic", "of sm_90"), ("triton", "from sm_80")])
def test_a_gpu_kernel_says_why_it_cannot_run_here(name, needed):
    x = jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"needs an NVIDIA GPU {needed}"):
        hebbian_scan(x, x, x, jnp.zeros((1, 4, 1)), 1.0, implementation=name)

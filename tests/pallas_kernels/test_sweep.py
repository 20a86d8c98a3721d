"""The fused form of the Hebbian scan, through the tiles that the GPU kernels share, against the law in float64."""

from __future__ import annotations

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


@pytest.mark.parametrize(("name", "oldest"), [("mosaic", "sm_90"), ("triton", "sm_80")])
def test_a_gpu_kernel_says_why_it_cannot_run_here(name, oldest):
    x = jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"needs an NVIDIA GPU from {oldest}"):
        hebbian_scan(x, x, x, jnp.zeros((1, 4, 1)), 1.0, implementation=name)

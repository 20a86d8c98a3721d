"""The kernels on a real device, forward and every gradient, against the law in float64 on the host."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import hebbian_scan
from pallas_kernels.hebbian import naive
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state

pytestmark = pytest.mark.gpu
NAMES = ("y", "final", "dq", "dk", "dv", "dlog_decay", "deta", "dinitial")


def with_gradients(scan, arguments, cotangents):
    results, pullback = jax.vjp(scan, *arguments)
    return results, pullback(cotangents)


# (B, N, H): 8 streams are cut into segments, 66 are not; lengths are no multiples of a chunk. Rates from slow memories
# to chunks whose decays leave the range of the factored form, and resets, which always do.
@pytest.mark.parametrize(
    ("name", "dtype", "sizes", "widths", "rate", "resets"),
    [
        ("mosaic", jnp.bfloat16, (2, 1000, 4), (64, 64), 1.3, True),
        ("mosaic", jnp.bfloat16, (33, 70, 2), (64, 64), 0.05, False),
        ("mosaic", jnp.bfloat16, (1, 600, 2), (128, 128), 1e-3, True),
        ("mosaic", jnp.bfloat16, (1, 300, 2), (64, 128), 20.0, False),
        ("triton", jnp.bfloat16, (2, 1000, 4), (64, 64), 1.3, True),
        ("triton", jnp.bfloat16, (1, 600, 2), (128, 64), 1e-3, False),
        ("triton", jnp.float32, (1, 300, 2), (32, 64), 0.05, True),
    ],
)
def test_kernel_follows_the_law(name, dtype, sizes, widths, rate, resets):
    rng = np.random.default_rng(0)
    (keys, values), (batch, _, heads) = widths, sizes
    vectors = [jnp.asarray(rng.normal(size=(*sizes, width)), dtype) for width in (keys, keys, values)]
    log_decay = jnp.asarray(-rate * np.abs(rng.normal(size=sizes)), jnp.float32)
    eta = jnp.asarray(rng.normal(size=sizes), jnp.float32)
    initial = jnp.asarray(rng.normal(size=(batch, heads, keys, values)), jnp.float32)
    reset = jnp.asarray(rng.random(sizes[:2]) < 0.02) if resets else None
    arguments = (*vectors, log_decay, eta, initial)
    cotangents = (jnp.asarray(rng.normal(size=(*sizes, values)), dtype), initial[::-1] + 1)
    kernel = jax.jit(
        functools.partial(with_gradients, functools.partial(hebbian_scan, reset=reset, implementation=name))
    )
    found, again = (jax.tree.leaves(kernel(arguments, cotangents)) for _ in range(2))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
        law = functools.partial(naive.scan, reset_BxN=None if reset is None else jnp.asarray(np.asarray(reset)))
        expected = jax.tree.leaves(jax.jit(functools.partial(with_gradients, law))(*wide))
    # Roundings of bfloat16 operands are 2e-3 each; float32 sums err by their length in units of 6e-8.
    bound = 5e-3 if dtype == jnp.bfloat16 else 1e-6
    errors = {}
    for label, x, same, reference in zip(NAMES, found, again, expected, strict=True):
        x, reference = np.asarray(x, np.float64), np.asarray(reference)
        errors[label] = float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
        assert np.array_equal(x, np.asarray(same, np.float64)), f"{label} is not the same twice"
    print(errors)
    assert max(errors.values()) < bound, errors


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_the_model_computes_the_same_with_a_kernel(name):
    config = ModelConfig(vocab_size=64, d_model=128, num_layers=2, num_heads=2, head_dim=64, dtype="bfloat16")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 512)))

    def gradients(implementation):
        model = LanguageModel(config, seq_len=512, rngs=nnx.Rngs(0), implementation=implementation)
        graphdef, params = nnx.split(model)

        @jax.jit
        def run(params):
            def loss(params):
                logits, _, _ = nnx.merge(graphdef, params)(tokens, init_state(config, 2), aligned=True)
                return jnp.mean(jnp.square(logits))

            return jax.value_and_grad(loss)(params)

        return run(params)

    found, reference = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradients(n))]) for n in (name, "xla"))
    # Two layers of bfloat16 products, rounded at other places.
    assert float(jnp.linalg.norm(found - reference) / jnp.linalg.norm(reference)) < 2e-2

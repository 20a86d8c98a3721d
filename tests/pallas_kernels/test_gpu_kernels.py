"""The kernels on a real device, forward and every gradient, against the law in float64 on the host."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from pallas_kernels import delta_scan, hebbian_scan, resolvent_scan
from pallas_kernels.hebbian import naive
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.model.language_model import LanguageModel, init_state

pytestmark = pytest.mark.gpu
NAMES = ("y", "final", "dq", "dk", "dv", "dlog_decay", "deta", "dinitial")


def with_gradients(scan, arguments, cotangents):
    results, pullback = jax.vjp(scan, *arguments)
    return results, pullback(cotangents)


def in_two_halves(scan):
    """scan, mapped over two halves of the batch."""

    def mapped(*arguments, reset):
        def half(reset, *arguments):
            return scan(*arguments, reset=reset)

        halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), (reset, *arguments))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(half)(*halves))

    return mapped


# (B, N, H): 8 streams are cut into segments, 66 are not; lengths are no multiples of a chunk. Rates from slow memories
# to chunks whose decays leave the range of the factored form, and resets, which always do.
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "sizes", "widths", "rate", "resets"),
    [
        ("mosaic", jnp.bfloat16, (2, 1000, 4), (64, 64), 1.3, True),
        ("mosaic", jnp.bfloat16, (33, 70, 2), (64, 64), 0.05, False),
        ("mosaic", jnp.bfloat16, (1, 600, 2), (128, 128), 1e-3, True),
        ("mosaic", jnp.bfloat16, (1, 300, 2), (64, 128), 20.0, False),
        ("mosaic", jnp.bfloat16, (2, 130, 1), (16, 16), 0.05, True),
        ("mosaic", jnp.bfloat16, (66, 330, 2), (96, 32), 0.05, True),
        # Wider than its tiles: in parts.
        ("mosaic", jnp.bfloat16, (2, 600, 3), (256, 128), 0.05, True),
        ("mosaic", jnp.bfloat16, (2, 300, 2), (150, 300), 1e-3, False),
        ("mosaic", jnp.bfloat16, (2, 300, 1), (64, 512), 1e-3, True),
        ("triton", jnp.bfloat16, (2, 1000, 4), (64, 64), 1.3, True),
        ("triton", jnp.bfloat16, (1, 600, 2), (128, 64), 1e-3, False),
        ("triton", jnp.bfloat16, (66, 330, 2), (16, 16), 0.05, True),
        ("triton", jnp.bfloat16, (2, 300, 3), (192, 256), 0.05, True),
        # So many streams and chunks that programs of the backward take 8 and 16 chunks, and the longest sequence.
        ("mosaic", jnp.bfloat16, (66, 520, 4), (16, 16), 0.05, True),
        ("mosaic", jnp.bfloat16, (66, 1030, 4), (16, 16), 0.05, True),
        ("mosaic", jnp.bfloat16, (66, 1030, 4), (80, 16), 0.05, True),
        ("mosaic", jnp.bfloat16, (1, 2**20, 1), (16, 16), 1e-3, False),
        ("triton", jnp.bfloat16, (66, 1030, 4), (16, 16), 0.05, True),
        ("triton", jnp.bfloat16, (66, 2050, 4), (16, 16), 0.05, True),
        ("triton", jnp.bfloat16, (1, 2**20, 1), (16, 16), 1e-3, False),
        ("triton", jnp.float32, (1, 300, 2), (32, 64), 0.05, True),
        ("triton", jnp.float32, (2, 700, 2), (64, 64), 5.0, True),
        # Narrow states: the recurrence alone. One stream in several blocks; all columns of a row in one program or
        # not, or more than there are; a single token.
        ("triton", jnp.float32, (1, 5000, 1), (1, 2), 1e-4, False),
        ("triton", jnp.float32, (1, 5000, 1), (1, 2), 0.05, True),
        ("triton", jnp.float32, (16, 256, 8), (1, 2), 0.05, True),
        ("triton", jnp.float32, (66, 330, 3), (1, 2), 1.3, True),
        ("triton", jnp.float32, (130, 67, 5), (3, 5), 20.0, False),
        ("triton", jnp.float32, (2, 1, 3), (4, 4), 0.05, False),
    ],
)
def test_kernel_follows_the_law(name, dtype, sizes, widths, rate, resets, mapped):
    if mapped and sizes[0] % 2:
        pytest.skip("a batch of one has no halves")
    rng = np.random.default_rng(0)
    (keys, values), (batch, _, heads) = widths, sizes
    vectors = [jnp.asarray(rng.normal(size=(*sizes, width)), dtype) for width in (keys, keys, values)]
    log_decay = jnp.asarray(-rate * np.abs(rng.normal(size=sizes)), jnp.float32)
    eta = jnp.asarray(rng.normal(size=sizes), jnp.float32)
    initial = jnp.asarray(rng.normal(size=(batch, heads, keys, values)), jnp.float32)
    reset = jnp.asarray(rng.random(sizes[:2]) < 0.02) if resets else None
    arguments = (*vectors, log_decay, eta, initial)
    cotangents = (jnp.asarray(rng.normal(size=(*sizes, values)), dtype), initial[::-1] + 1)
    scan = functools.partial(hebbian_scan, implementation=name)
    scan = functools.partial(in_two_halves(scan) if mapped else scan, reset=reset)
    kernel = jax.jit(functools.partial(with_gradients, scan))
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


# Total log2 decays of a chunk: just inside the range of mosaic's factored form, and beyond it.
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("total", [47.0, 90.0])
@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_huge_inputs_stay_finite(name, total, width):
    rng = np.random.default_rng(0)
    sizes = (1, 200, 1)
    q, k, v, dy = (jnp.asarray(2.0**20 * rng.normal(size=(*sizes, width)), jnp.bfloat16) for _ in range(4))
    log_decay = jnp.full(sizes, -total / 64 * np.log(2), jnp.float32)
    initial = jnp.asarray(2.0**40 * rng.normal(size=(1, 1, width, width)), jnp.float32)
    arguments, cotangents = (q, k, v, log_decay, jnp.ones(sizes, jnp.float32), initial), (dy, initial)
    scan = functools.partial(hebbian_scan, implementation=name)
    found = jax.jit(functools.partial(with_gradients, scan))(arguments, cotangents)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
        law = functools.partial(naive.scan, reset_BxN=None)
        expected = jax.tree.leaves(jax.jit(functools.partial(with_gradients, law))(*wide))
    for label, x, reference in zip(NAMES, jax.tree.leaves(found), expected, strict=True):
        x, reference = np.asarray(x, np.float64), np.asarray(reference)
        # Roundings of bfloat16 operands are 2e-3 each.
        assert np.linalg.norm(x - reference) < 5e-3 * np.linalg.norm(reference), label


# The last has widths that the walk's kernel does not take.
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "tokens", "widths"),
    [
        ("mosaic", jnp.bfloat16, 700, (64, 64)),
        ("mosaic", jnp.bfloat16, 300, (128, 128)),
        ("triton", jnp.bfloat16, 700, (64, 64)),
        ("triton", jnp.float32, 300, (16, 32)),
        ("triton", jnp.float32, 20, (64, 64)),
        ("mosaic", jnp.bfloat16, 130, (96, 96)),
    ],
)
def test_corrected_errors_follow_the_law(name, dtype, tokens, widths, mapped):
    rng = np.random.default_rng(0)
    sizes, (keys, values) = (2, tokens, 2), widths
    q, k = (jnp.asarray(rng.normal(size=(*sizes, keys)) / keys**0.5, dtype) for _ in range(2))
    v, dy = (jnp.asarray(rng.normal(size=(*sizes, values)) / 8, dtype) for _ in range(2))
    log_decay = jnp.asarray(-0.05 * np.abs(rng.normal(size=sizes)), jnp.float32)
    eta = jnp.asarray(rng.uniform(size=sizes), jnp.float32)
    initial = jnp.asarray(rng.normal(size=(2, 2, keys, values)), jnp.float32)
    reset = jnp.asarray(rng.random(sizes[:2]) < 0.02)
    arguments, cotangents = (q, k, v, log_decay, eta, initial), (dy, initial[::-1])

    def scan(implementation, reset):
        plain = functools.partial(delta_scan, implementation=implementation)
        chosen = in_two_halves(plain) if mapped and implementation != "naive" else plain
        return jax.jit(functools.partial(with_gradients, functools.partial(chosen, reset=reset)))

    found, again = (jax.tree.leaves(scan(name, reset)(arguments, cotangents)) for _ in range(2))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
        expected = jax.tree.leaves(scan("naive", jnp.asarray(np.asarray(reset)))(*wide))
    # The corrected values are rounded to bfloat16 once more than the operands; float32 as for the Hebbian scan.
    bound = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    for label, x, same, reference in zip(NAMES, found, again, expected, strict=True):
        assert np.array_equal(x, same), f"{label} is not the same twice"
        x, reference = np.asarray(x, np.float64), np.asarray(reference)
        assert np.linalg.norm(x - reference) < bound * np.linalg.norm(reference), label


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_more_streams_than_an_axis_of_programs_holds(name):
    batch, width = 66_000, 64
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, 1, 1, width), jnp.bfloat16) for key in keys)
    y, final = jax.jit(functools.partial(hebbian_scan, implementation=name))(q, k, v, jnp.zeros((batch, 1, 1)), 1.0)
    reference = jnp.sum(q.astype(jnp.float32) * k, axis=-1, keepdims=True) * v
    # One rounding of the scores and one of the result to bfloat16.
    assert float(jnp.linalg.norm(y - reference) / jnp.linalg.norm(reference)) < 5e-3
    last_k, last_v = (x[-1, 0, 0].astype(jnp.float32) for x in (k, v))
    np.testing.assert_array_equal(final[-1, 0], jnp.outer(last_k, last_v))


def test_more_narrow_states_than_an_axis_of_programs_holds():
    batch = 66_000
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (batch, 1, 4, 4)) for key in keys)
    y, final = jax.jit(functools.partial(hebbian_scan, implementation="triton"))(q, k, v, jnp.zeros((batch, 1, 4)), 1.0)
    np.testing.assert_array_equal(final, k[:, 0, :, :, None] * v[:, 0, :, None, :])
    reference = jnp.sum(q * k, axis=-1, keepdims=True) * v
    assert float(jnp.linalg.norm(y - reference) / jnp.linalg.norm(reference)) < 1e-6


def test_the_default_is_a_kernel():
    if jax.device_count() > 1:
        pytest.skip("with several devices the compiler divides the plain form among them")
    x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)
    gate = jax.ShapeDtypeStruct((2, 128, 2), jnp.float32)
    text = jax.jit(hebbian_scan).lower(x, x, x, gate, gate).as_text()
    assert "mosaic_gpu" in text or "triton" in text


# (B, N, H): chunks that a sequence does not fill, more than one program, chunks longer than 32 tokens.
@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize(("sizes", "damping"), [((2, 7, 3), 0.1), ((4, 1000, 8), 0.1), ((2, 40_000, 2), 1.0)])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_resolvent_kernel_follows_the_law(mode, sizes, damping, mapped):
    rng = np.random.default_rng(0)
    batch, _, heads = sizes
    v, rates = rng.normal(size=sizes), damping * rng.uniform(0.5, 1.5, size=sizes)
    u, reset = rng.uniform(0, 1.5, size=sizes), rng.random(sizes[:2]) < 0.02
    initial = rng.normal(size=(batch, heads)), np.abs(rng.normal(size=(batch, heads)))
    arguments = jax.tree.map(lambda x: np.asarray(x, np.float32), (v, rates, u, initial))
    cotangent = tuple(np.asarray(rng.normal(size=sizes), np.float32) for _ in range(2))

    def scan(name):
        def plain(v, rates, u, initial, *, reset):
            initial, zero = initial if mode == "causal" else None, jnp.zeros(heads, v.dtype)
            options = {"reset": reset, "mode": mode, "implementation": name}
            return resolvent_scan(v, rates, u, zero, zero, initial, **options)[:2]

        chosen = in_two_halves(plain) if mapped and name == "triton" else plain
        return functools.partial(with_gradients, functools.partial(chosen, reset=jnp.asarray(reset)))

    kernel = jax.jit(scan("triton"))
    found, again = (jax.tree.leaves(kernel(arguments, cotangent)) for _ in range(2))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (arguments, cotangent))
        expected = jax.tree.leaves(jax.jit(scan("naive"))(*wide))
    for x, same, reference in zip(found, again, expected, strict=True):
        reference = np.asarray(reference)
        # Rounding of float32, amplified by |g| up to 20, squared in the gradients.
        assert np.linalg.norm(np.asarray(x, np.float64) - reference) <= 1e-5 * np.linalg.norm(reference) + 1e-12
        assert np.array_equal(x, same)


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_the_model_computes_the_same_with_a_kernel(name):
    # Consolidation, which the kernels do not see, would take a GPU a minute to compile.
    config = ModelConfig(
        vocab_size=64,
        d_model=128,
        num_layers=1,
        num_heads=2,
        head_dim=64,
        dtype="bfloat16",
        consolidation=ConsolidationConfig(interval=0),
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 512)))

    def gradients(implementation):
        def make():
            return LanguageModel(config, seq_len=512, rngs=nnx.Rngs(0), implementation=implementation)

        graphdef = nnx.split(nnx.eval_shape(make))[0]

        def loss(params):
            logits, _, _ = nnx.merge(graphdef, params)(tokens, init_state(config, 2), aligned=True)
            return jnp.mean(jnp.square(logits))

        # As two programs: one operation after the other, a GPU would compile for minutes.
        params = jax.jit(lambda: nnx.split(make())[1])()
        return jax.jit(lambda params: ravel_pytree(jax.value_and_grad(loss)(params))[0])(params)

    found, reference = gradients(name), gradients("xla")
    # bfloat16 products, rounded at other places.
    assert float(jnp.linalg.norm(found - reference) / jnp.linalg.norm(reference)) < 2e-2

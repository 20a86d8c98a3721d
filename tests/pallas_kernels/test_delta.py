"""The error-correcting memory in chunks against its law, and what corrections are for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import delta_scan, delta_scan_with_values, hebbian_scan, registry
from pallas_kernels.delta.inverse import unit_lower_inverse
from pallas_kernels.products import product

NAMES = ("y", "state", "u", "dq", "dk", "dv", "dlog_decay", "deta", "dinitial_state")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make_inputs(batch, tokens, heads, key_width, value_width, seed=0, dtype: Any = np.float64):
    """Unit keys of which many repeat, decays from none to instant, corrections from none to whole."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, batch, tokens, heads, key_width))
    k[:, 1::3] = k[:, :1]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(batch, tokens, heads, value_width))
    log_decay = -(10.0 ** rng.uniform(-6, 0.5, size=(batch, tokens, heads)))
    log_decay.flat[::7] = 0
    log_decay.flat[5::29] = -50
    log_decay.flat[11::83] = -1e4
    eta = rng.uniform(0, 1, size=(batch, tokens, heads))
    eta.flat[::5] = 0
    eta.flat[3::5] = 1
    state = rng.normal(size=(batch, heads, key_width, value_width))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, log_decay, eta, state))


def make_reset(batch, tokens):
    reset = np.random.default_rng(1).uniform(size=(batch, tokens)) < 0.04
    return jnp.asarray(reset).at[0, 0].set(True)


@functools.partial(jax.jit, static_argnames="implementation")
def values_and_gradients(inputs, reset, weights, implementation):
    def loss(inputs):
        results = delta_scan_with_values(*inputs, reset=reset, implementation=implementation)
        return sum(jnp.sum(w * x) for w, x in zip(weights, results, strict=True)), results

    (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return dict(zip(NAMES, (*results, *gradients), strict=True))


def computed(inputs, reset, implementation):
    rng = np.random.default_rng(2)
    shapes = inputs[2].shape, inputs[5].shape, inputs[2].shape
    weights = tuple(jnp.asarray(rng.normal(size=shape), inputs[5].dtype) for shape in shapes)
    return values_and_gradients(inputs, reset, weights, implementation)


def assert_close(actual, expected, tolerance):
    for name, value in expected.items():
        error = np.linalg.norm(np.asarray(actual[name], np.float64) - np.asarray(value, np.float64))
        assert error <= tolerance * np.linalg.norm(np.asarray(value, np.float64)) + 1e-300, name


# One token, a padded chunk, chunks of different fill, and 256 tokens, from where the stored state is renewed, exceeded.
@pytest.mark.parametrize(("tokens", "resets"), [(1, True), (37, False), (130, True), (300, True)])
@pytest.mark.usefixtures("x64")
def test_values_and_every_gradient_are_those_of_the_law(tokens, resets):
    inputs = make_inputs(2, tokens, 2, 5, 4)
    reset = make_reset(2, tokens) if resets else None
    expected = computed(inputs, reset, "naive")
    # float64 rounding; a wrong term is of order 1.
    assert_close(computed(inputs, reset, "xla"), expected, 1e-12)
    single = tuple(x.astype(jnp.float32) for x in inputs)
    assert_close(computed(single, reset, "xla"), expected, 1e-5)


@pytest.mark.parametrize("log_decay", [0.0, -50.0])
@pytest.mark.usefixtures("x64")
def test_the_same_key_over_and_over_costs_no_digits(log_decay):
    _, k, v, gate, _, state = make_inputs(1, 200, 2, 8, 4)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    inputs = (k, k, v, jnp.full_like(gate, log_decay), jnp.full_like(gate, 0.999), state)
    single = tuple(x.astype(jnp.float32) for x in inputs)
    # Two float32 sums of the same float32 numbers: the inverse alone, as a product of powers, would lose all digits.
    exact = computed(tuple(x.astype(jnp.float64) for x in single), None, "naive")
    actual = computed(single, None, "xla")
    for name in ("y", "state", "u", "dq", "dk", "dv", "deta"):
        assert_close({name: actual[name]}, {name: exact[name]}, 1e-5)


@pytest.mark.usefixtures("x64")
def test_gradients_are_the_finite_differences():
    q, k, v, log_decay, eta, state = make_inputs(1, 37, 2, 3, 6)
    inputs = (q, k, v, log_decay - 1e-3, eta, state)  # room on both sides: log_decay <= 0
    reset = make_reset(1, 37)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=tuple(range(6)))
    def loss(*args):
        y, state = delta_scan(*args, reset=reset, implementation="xla")
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    _, gradient = loss(*inputs)
    rng = np.random.default_rng(3)
    for i, x in enumerate(inputs):
        direction = jnp.asarray(rng.normal(size=x.shape))
        ahead, behind = (loss(*inputs[:i], x + step * direction, *inputs[i + 1 :])[0] for step in (1e-5, -1e-5))
        # Central differences with step 1e-5 err by about 1e-10 (curvature) + 1e-16 / 1e-5 (rounding).
        numeric = (ahead - behind) / 2e-5
        np.testing.assert_allclose(
            jnp.sum(gradient[i] * direction), numeric, rtol=1e-6, atol=1e-8, err_msg=NAMES[3 + i]
        )


@pytest.mark.usefixtures("x64")
def test_rounding_to_bfloat16_does_not_add_up_over_a_sequence():
    """Nothing is forgotten, so that only corrections undo what rounding does."""
    q, k, v, gate, _, state = make_inputs(1, 3000, 2, 16, 16)
    half = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    gates = (jnp.zeros(gate.shape, jnp.float32), jnp.full(gate.shape, 0.37, jnp.float32), state.astype(jnp.float32))
    exact = computed(tuple(x.astype(jnp.float64) for x in (*half, *gates)), None, "naive")
    actual = computed((*half, *gates), None, "xla")
    assert actual["u"].dtype == actual["y"].dtype == actual["dk"].dtype == jnp.bfloat16
    assert actual["state"].dtype == actual["dlog_decay"].dtype == jnp.float32
    # Operands are rounded by up to 2^-9 = 2e-3. Measured: 6e-3; in one segment 2e-2.
    names = ("y", "state", "u", "dq", "dk", "dv", "deta")
    assert_close({name: actual[name] for name in names}, {name: exact[name] for name in names}, 1e-2)


def test_a_whole_correction_replaces_a_value_and_half_a_correction_half_of_it():
    _, k, v, gate, _, _ = make_inputs(1, 2, 1, 8, 4, dtype=np.float32)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    for eta, old in ((1.0, 0.0), (0.5, 0.25)):
        y, _ = delta_scan(k, k, v, jnp.zeros_like(gate), eta)
        # Unit keys to float32 rounding.
        np.testing.assert_allclose(y[:, 1], old * v[:, 0] + eta * v[:, 1], rtol=1e-5, atol=1e-6)


def test_unrelated_keys_leave_nothing_to_correct():
    tokens = 6
    keys = jnp.eye(tokens)[None, :, None]
    _, _, v, gate, eta, _ = make_inputs(1, tokens, 1, 8, 4, dtype=np.float32)
    y, state = delta_scan(keys, keys, v, gate, eta)
    y_hebbian, state_hebbian = hebbian_scan(keys, keys, v, gate, eta)
    np.testing.assert_allclose(y, y_hebbian, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, state_hebbian, rtol=1e-5, atol=1e-6)


scan_jit = jax.jit(functools.partial(delta_scan, implementation="xla"))


def test_a_stream_in_parts_is_the_whole():
    *tokens, start = make_inputs(2, 300, 2, 8, 4, dtype=np.float32)
    reset = make_reset(2, 300)
    whole, last = scan_jit(*tokens, start, reset=reset)
    parts, state = [], start
    for part in (slice(0, 77), slice(77, 78), slice(78, 300)):
        y, state = scan_jit(*(x[:, part] for x in tokens), state, reset=reset[:, part])
        parts.append(y)
    # float32 sums in another order.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)


def test_later_tokens_never_change_earlier_outputs_nor_those_before_a_reset_later_ones():
    *tokens, state = make_inputs(2, 300, 2, 8, 4, dtype=np.float32)
    *others, other_state = make_inputs(2, 300, 2, 8, 4, dtype=np.float32, seed=9)
    at = 77
    reset = jnp.zeros((2, 300), bool).at[:, at].set(True)
    before, last = scan_jit(*tokens, state, reset=reset)
    late = [x.at[:, at:].set(other[:, at:]) for x, other in zip(tokens, others, strict=True)]
    np.testing.assert_array_equal(scan_jit(*late, state, reset=reset)[0][:, :at], before[:, :at])
    early = [x.at[:, :at].set(other[:, :at]) for x, other in zip(tokens, others, strict=True)]
    y, last_early = scan_jit(*early, 1e6 * other_state, reset=reset)
    np.testing.assert_array_equal(y[:, at:], before[:, at:])
    np.testing.assert_array_equal(last_early, last)


@functools.cache
def jitted_gradients():
    def loss(q, k, v, log_decay, eta, state, reset):
        y, last = delta_scan(q, k, v, log_decay, eta, state, reset=reset, implementation="xla")
        return jnp.sum(y) + jnp.sum(last), (y, last)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    scales=st.tuples(*[st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e8])] * 3),
    unit=st.sampled_from([0.0, 1e-20, 1.0]),
    rates=st.lists(
        st.sampled_from([0.0, 1e-45, 1e-30, 1e-6, 1e-3, 1.0, 50.0, 87.5, 104.0, 128.0, 1e4, 3e38]),
        min_size=1,
        max_size=6,
    ),
)
def test_keys_up_to_unit_length_never_give_nan_and_repeat_bit_for_bit(seed, scales, unit, rates):
    rng = np.random.default_rng(seed)
    q, k, v, _, eta, state = make_inputs(1, 70, 2, 3, 6, dtype=np.float32)
    q, v, state = (x * np.float32(scale) for x, scale in zip((q, v, state), scales, strict=True))
    log_decay = -jnp.asarray(rng.choice(rates, size=(1, 70, 2)), jnp.float32)
    reset = jnp.asarray(rng.uniform(size=(1, 70)) < 0.05)
    args = (q, np.float32(unit) * k, v, log_decay, eta, state, reset)
    first = jitted_gradients()(*args)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(first))
    jax.tree.map(np.testing.assert_array_equal, first, jitted_gradients()(*args))


def test_products_on_a_cpu_beside_a_gpu_are_exact(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 8, 8))
    monkeypatch.setattr(registry, "compute_capability", lambda device: 9.0)
    found = jax.jit(functools.partial(product, "bij,bjk->bik"))(jnp.float32(a), jnp.float32(b))
    # float32 rounding.
    np.testing.assert_allclose(found, a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_inverse_of_a_triangle(size):
    rng = np.random.default_rng(0)
    ones = np.tril(np.ones((3, size, size), np.float32), -1)
    for below in (ones, ones * rng.uniform(-1, 1, size=ones.shape).astype(np.float32) / 4):
        inverse = unit_lower_inverse(jnp.asarray(below))
        exact = np.linalg.inv(np.eye(size) + below.astype(np.float64))
        np.testing.assert_allclose(inverse, exact, rtol=1e-5, atol=1e-6)


def test_delta_scan_names_what_is_wrong():
    x, gate = jnp.ones((2, 5, 3, 4)), -jnp.ones((2, 5, 3))
    with pytest.raises(ValueError, match="delta_scan: log_decay must be"):
        delta_scan(x, x, x, gate[:, :2], 0.1)
    with pytest.raises(ValueError, match=r"delta_scan.*'mosaic2' is not in this version"):
        delta_scan(x, x, x, gate, 0.1, implementation="mosaic2")

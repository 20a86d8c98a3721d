"""The chunked Hebbian scan against its law: values, every gradient, and what must hold for any input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import hebbian_scan, hebbian_step
from pallas_kernels.hebbian import chunked, decays, naive

NAMES = ("q", "k", "v", "log_decay", "eta", "initial_state")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make_inputs(batch, tokens, heads, key_width, value_width, dtype: Any = np.float64, seed=0):
    """Random inputs whose decays go from none (0) over slow (1e-6) and fast (50) to instant (1e4)."""
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(2, batch, tokens, heads, key_width))
    v = rng.normal(size=(batch, tokens, heads, value_width))
    log_decay = -(10.0 ** rng.uniform(-6, 0.5, size=(batch, tokens, heads)))
    log_decay.flat[::7] = 0
    log_decay.flat[5::29] = -50
    log_decay.flat[11::83] = -1e4
    eta = rng.uniform(0, 1, size=(batch, tokens, heads))
    eta.flat[::5] = 0
    state = rng.normal(size=(batch, heads, key_width, value_width))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v, log_decay, eta, state))


def make_reset(batch, tokens):
    reset = np.random.default_rng(1).uniform(size=(batch, tokens)) < 0.06
    reset[0, 0] = True
    return jnp.asarray(reset)


@functools.cache
def compiled_gradients(scan, **options):
    """Compiled once for each scan: compilation is what these tests spend their time on."""

    def loss(inputs, reset, weights):
        y, state = scan(*inputs, reset, **options)
        total = jnp.sum(weights[0] * y) + jnp.sum(weights[1] * state)
        return total.astype(state.dtype), (y, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def values_and_gradients(scan, inputs, reset, **options):
    """y, final state and all gradients of a weighted sum of both."""
    rng = np.random.default_rng(2)
    weights = rng.normal(size=inputs[2].shape), rng.normal(size=inputs[5].shape)
    (_, results), gradients = compiled_gradients(scan, **options)(inputs, reset, weights)
    return dict(zip(("y", "state", *NAMES), (*results, *gradients), strict=True))


def assert_close(actual, expected, tolerance):
    for name, value in expected.items():
        error = np.linalg.norm(np.asarray(actual[name], np.float64) - np.asarray(value, np.float64))
        assert error <= tolerance * np.linalg.norm(np.asarray(value, np.float64)) + 1e-300, name


@pytest.mark.parametrize(
    ("tokens", "widths", "rows", "resets"),
    [
        (1, (3, 5), None, True),
        (65, (5, 4), None, False),
        (130, (5, 7), 2 * 3 * 32, True),  # three segments of different fill, chunks of 32
        (65, (1, 2), None, True),  # the form for narrow states
    ],
)
@pytest.mark.usefixtures("x64")
def test_values_and_every_gradient_are_those_of_the_law(tokens, widths, rows, resets):
    inputs = make_inputs(2, tokens, 3, *widths)
    reset = make_reset(2, tokens) if resets else None
    expected = values_and_gradients(naive.scan, inputs, reset)
    actual = values_and_gradients(chunked.scan, inputs, reset, rows=rows)
    # float64 rounding over 130 tokens; a wrong term is of order 1.
    assert_close(actual, expected, 1e-12)


@pytest.mark.usefixtures("x64")
def test_gradients_are_the_finite_differences():
    inputs = make_inputs(1, 37, 2, 3, 6)
    inputs = (*inputs[:3], inputs[3] - 1e-3, *inputs[4:])  # room on both sides: log_decay <= 0
    reset = make_reset(1, 37)
    step = 1e-5

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=tuple(range(6)))
    def loss(*args):
        y, state = hebbian_scan(*args, reset=reset, implementation="xla")
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    _, gradient = loss(*inputs)
    rng = np.random.default_rng(3)
    for i, name in enumerate(NAMES):
        direction = jnp.asarray(rng.normal(size=inputs[i].shape))

        def moved(sign, i=i, direction=direction):
            return loss(*inputs[:i], inputs[i] + sign * step * direction, *inputs[i + 1 :])[0]

        numeric = (moved(1) - moved(-1)) / (2 * step)
        # Central differences with step 1e-5 err by about 1e-10 (curvature) + 1e-16 / 1e-5 (rounding).
        np.testing.assert_allclose(jnp.sum(gradient[i] * direction), numeric, rtol=1e-6, atol=1e-8, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_float32_keeps_five_digits_through_adversarial_decays():
    tokens = 150
    inputs = make_inputs(1, tokens, 2, 5, 6)
    pattern = np.tile(np.r_[np.full(30, -50.0), np.full(20, -1e-3)], 3)
    inputs = (*inputs[:3], jnp.broadcast_to(jnp.asarray(pattern)[None, :, None], (1, tokens, 2)), *inputs[4:])
    expected = values_and_gradients(naive.scan, inputs, None)
    single = tuple(x.astype(jnp.float32) for x in inputs)
    actual = values_and_gradients(chunked.scan, single, None, chunk=64)
    assert actual["y"].dtype == actual["state"].dtype == jnp.float32
    assert_close(actual, expected, 1e-5)


@pytest.mark.usefixtures("x64")
def test_decays_inside_a_chunk_do_not_cancel():
    rng = np.random.default_rng(0)
    log_decay = np.r_[np.full(30, -50.0), np.full(20, -1e-3), -(10.0 ** rng.uniform(-6, 2, 78))].astype(np.float32)
    exact = log_decay.astype(np.float64)
    sums = np.array([[exact[j + 1 : i + 1].sum() if i >= j else -np.inf for j in range(128)] for i in range(128)])
    between = decays.chunk_decays(jnp.asarray(log_decay)[None, None, None], None).between[0, 0, 0]
    seen = sums > -60
    # exp of a float32 exponent of size up to 60 is known to 60 * 2^-24 = 4e-6; small exponents to some 1e-7.
    np.testing.assert_allclose(between[seen], np.exp(sums[seen]), rtol=5e-6)
    close = sums > -1
    np.testing.assert_allclose(between[close], np.exp(sums[close]), rtol=3e-7)
    assert not np.asarray(between)[np.triu_indices(128, 1)].any()


@pytest.mark.usefixtures("x64")
def test_slow_constant_decay_over_a_long_sequence_has_no_bias():
    tokens = 65536
    q, k, v, _, eta, state = make_inputs(1, tokens, 1, 4, 5)
    log_decay = jnp.full((1, tokens, 1), np.float32(-1e-5), jnp.float64)
    inputs = (q, k, v, log_decay, 1e-3 * eta, state + 100)
    expected = dict(zip(("y", "state"), jax.jit(naive.scan)(*inputs, None), strict=True))
    single = tuple(x.astype(jnp.float32) for x in inputs)
    actual = dict(zip(("y", "state"), jax.jit(chunked.scan)(*single, None), strict=True))
    # Random rounding costs 1e-6 to 2e-6; exp in the place of expm1 9e-6 (y) and 2e-5 (state), float32 steps 4e-4.
    assert_close(actual, expected, 4e-6)


@pytest.mark.usefixtures("x64")
def test_broadcast_arguments_get_gradients_of_their_own_shape():
    q, k, v, log_decay, _, state = make_inputs(2, 33, 3, 4, 5)

    def loss(log_decay, eta):
        y, last = hebbian_scan(q, k, v, log_decay, eta, state)
        return jnp.sum(y**2) + jnp.sum(last**2)

    gradient = jax.grad(loss, (0, 1))
    for decay_shape in ((2, 33, 1), (2, 33, 3)):
        for eta_shape in ((), (3,), (33, 1), (2, 1, 3)):
            shapes = jax.eval_shape(gradient, jnp.zeros(decay_shape), jnp.zeros(eta_shape))
            assert tuple(x.shape for x in shapes) == (decay_shape, eta_shape)
    full = (2, 33, 3)
    shared = log_decay[..., :1]
    narrow = jax.jit(gradient)(shared, jnp.asarray(0.3))
    each = jax.jit(gradient)(jnp.broadcast_to(shared, full), jnp.full(full, 0.3))
    np.testing.assert_allclose(narrow[0], each[0].sum(-1, keepdims=True), rtol=1e-10)
    np.testing.assert_allclose(narrow[1], each[1].sum(), rtol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 5e-3), (jnp.float16, 1e-3)])
@pytest.mark.usefixtures("x64")
def test_half_precision_inputs(dtype, tolerance):
    inputs = make_inputs(2, 130, 3, 32, 16)
    half = tuple(x.astype(dtype) for x in inputs[:3])
    gates = tuple(x.astype(jnp.float32) for x in inputs[3:])
    expected = values_and_gradients(naive.scan, tuple(x.astype(jnp.float64) for x in (*half, *gates)), None)
    actual = values_and_gradients(chunked.scan, (*half, *gates), None)
    assert actual["y"].dtype == actual["q"].dtype == dtype
    assert actual["state"].dtype == actual["log_decay"].dtype == jnp.float32
    # bfloat16 rounds each operand by up to 2^-9 = 2e-3; float16 rounds only the result.
    assert_close(actual, expected, tolerance)


WIDTHS = [(8, 4), (1, 1)]  # dense chunks, and the form for narrow states
SPLIT = 77  # neither a chunk nor a segment ends here
scan_jit = jax.jit(functools.partial(hebbian_scan, implementation="xla"))


def single_inputs(widths, seed=0):
    return make_inputs(2, 130, 2, *widths, dtype=np.float32, seed=seed)


def parts_of(arrays, part):
    return tuple(x[:, part] for x in arrays)


@pytest.mark.parametrize("widths", WIDTHS)
def test_a_stream_in_two_parts_is_the_whole(widths):
    *tokens, state = single_inputs(widths)
    reset = make_reset(2, 130)
    whole, last = scan_jit(*tokens, state, reset=reset)
    first, state = scan_jit(*parts_of(tokens, slice(None, SPLIT)), state, reset=reset[:, :SPLIT])
    second, state = scan_jit(*parts_of(tokens, slice(SPLIT, None)), state, reset=reset[:, SPLIT:])
    # float32 sums in another order.
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("widths", WIDTHS)
def test_later_tokens_never_change_earlier_outputs(widths):
    *tokens, state = single_inputs(widths)
    *others, _ = single_inputs(widths, seed=9)
    reset = make_reset(2, 130)
    before, _ = scan_jit(*tokens, state, reset=reset)
    for t in (1, 64, 100):
        mixed = [x.at[:, t:].set(other[:, t:]) for x, other in zip(tokens, others, strict=True)]
        after, _ = scan_jit(*mixed, state, reset=reset.at[:, t:].set(~reset[:, t:]))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (np.asarray(after[:, t:]) != np.asarray(before[:, t:])).any()


@pytest.mark.parametrize("widths", WIDTHS)
def test_a_reset_is_a_fresh_start(widths):
    *tokens, state = single_inputs(widths)
    *others, other_state = single_inputs(widths, seed=9)
    reset = jnp.zeros((2, 130), bool).at[:, SPLIT].set(True)
    y, last = scan_jit(*tokens, state, reset=reset)
    fresh = parts_of(tokens, slice(SPLIT, None))
    fresh_y, fresh_last = scan_jit(*fresh, jnp.zeros_like(state), reset=jnp.zeros((2, 130 - SPLIT), bool))
    np.testing.assert_allclose(y[:, SPLIT:], fresh_y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last, fresh_last, rtol=1e-4, atol=1e-5)
    # Bit for bit nothing of the first document is left.
    mixed = [x.at[:, :SPLIT].set(other[:, :SPLIT]) for x, other in zip(tokens, others, strict=True)]
    y_other, last_other = scan_jit(*mixed, 1e6 * other_state, reset=reset)
    np.testing.assert_array_equal(y_other[:, SPLIT:], y[:, SPLIT:])
    np.testing.assert_array_equal(last_other, last)


@pytest.mark.slow
def test_works_under_vmap_remat_and_a_scan_over_layers():
    _, k, _, log_decay, eta, _ = single_inputs((6, 6))

    def layer(x):
        return hebbian_scan(x, k, x, log_decay, eta)[0] * 0.1

    def scanned(x):
        body = jax.checkpoint(jax.vmap(layer))
        return jnp.sum(jax.lax.scan(lambda x, _: (body(x), None), x, length=2)[0] ** 2)

    def plain(x):
        return sum(jnp.sum(layer(layer(row)) ** 2) for row in x)

    x = jnp.stack([k, 2 * k + 1])
    # The same sums in another order.
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), jax.jit(jax.grad(plain))(x), rtol=1e-4, atol=1e-5)


def test_steps_are_the_scan():
    *tokens, start = make_inputs(2, 9, 2, 8, 4, dtype=np.float32)
    reset = make_reset(2, 9).at[1, 4].set(True)
    y, last = scan_jit(*tokens, start, reset=reset)
    step, state = jax.jit(hebbian_step), start
    for t in range(9):
        y_t, state = step(*(x[:, t] for x in tokens), state, reset_B=reset[:, t])
        np.testing.assert_allclose(y_t, y[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)


def test_a_step_broadcasts_its_gates():
    q, k, v, log_decay, _, state = make_inputs(2, 1, 2, 8, 4, dtype=np.float32)
    q, k, v, log_decay = (x[:, 0] for x in (q, k, v, log_decay))
    step = jax.jit(hebbian_step)
    short, _ = step(q, k, v, log_decay[:, :1], 0.5, state)
    full, _ = step(q, k, v, log_decay[:, [0, 0]], jnp.full((2, 2), 0.5), state)
    np.testing.assert_array_equal(short, full)


@functools.cache
def jitted_gradients(widths):
    del widths  # one compiled function for each, kept over the examples

    def loss(q, k, v, log_decay, eta, state, reset):
        y, last = hebbian_scan(q, k, v, log_decay, eta, state, reset=reset, implementation="xla")
        return jnp.sum(y) + jnp.sum(last), (y, last)

    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(6)), has_aux=True))


@pytest.mark.parametrize("widths", [(3, 6), (1, 2)])
@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    scales=st.tuples(*[st.sampled_from([0.0, 1e-42, 1e-20, 1.0, 1e8])] * 4),
    rates=st.lists(
        st.sampled_from([0.0, 1e-45, 1e-30, 1e-6, 1e-3, 1.0, 50.0, 87.5, 104.0, 128.0, 1e4, 3e38]),
        min_size=1,
        max_size=6,
    ),
)
def test_finite_inputs_never_give_nan_and_repeat_bit_for_bit(widths, seed, scales, rates):
    rng = np.random.default_rng(seed)
    q, k, v, _, eta, state = make_inputs(1, 70, 2, *widths, dtype=np.float32)
    q, k, v, state = (x * np.float32(scale) for x, scale in zip((q, k, v, state), scales, strict=True))
    log_decay = -jnp.asarray(rng.choice(rates, size=(1, 70, 2)), jnp.float32)
    reset = jnp.asarray(rng.uniform(size=(1, 70)) < 0.05)
    args = (q, k, v, log_decay, eta, state, reset)
    first = jitted_gradients(widths)(*args)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(first))
    second = jitted_gradients(widths)(*args)
    jax.tree.map(np.testing.assert_array_equal, first, second)

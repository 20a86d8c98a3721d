"""The chunked resolvent scan against its law and against dense inverses; its bound; its gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import resolvent_scan
from pallas_kernels.resolvent import chunked, naive

HEADS = 3
scan_jit = jax.jit(resolvent_scan, static_argnames=("mode", "implementation"))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def make_inputs(tokens, dtype: Any = np.float64, seed=0, per_token=True):
    """v, gamma, u, z_re, z_im, initial_g with damping from 1e-3 to 10."""
    rng = np.random.default_rng(seed)
    shape = (2, tokens, HEADS)
    v = rng.normal(size=shape)
    gamma = 10.0 ** rng.uniform(-3, 1, size=shape)
    u = rng.uniform(0, 1.5, size=shape if per_token else (HEADS,))
    z_re, z_im = rng.normal(size=HEADS), 10.0 ** rng.uniform(-2, 0, size=HEADS)
    initial = rng.normal(size=(2, HEADS)), np.abs(rng.normal(size=(2, HEADS)))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (v, gamma, u, z_re, z_im, initial))


def make_reset(tokens):
    return jnp.asarray(np.random.default_rng(1).uniform(size=(2, tokens)) < 0.06)


def dense_hamiltonian(v, gamma, u, z_re, z_im):
    """H_eff - z of one batch row and head, with sqrt(u) on both sides of the diagonal."""
    off = np.emath.sqrt(np.asarray(u)[1:])
    return np.diag(np.asarray(v) - 1j * np.asarray(gamma) - z_re - 1j * z_im) + np.diag(off, 1) + np.diag(off, -1)


@pytest.mark.parametrize("implementation", ["naive", "xla"])
@pytest.mark.usefixtures("x64")
def test_it_is_the_inverse_of_the_hamiltonian(implementation):
    tokens = 40
    v, gamma, u, z_re, z_im, _ = make_inputs(tokens)
    u = u.at[:, ::3].multiply(-1)  # either sign is allowed
    scan = functools.partial(scan_jit, implementation=implementation)
    left_re, left_im, (last_re, last_im) = scan(v, gamma, u, z_re, z_im)
    both_re, both_im, nothing = scan(v, gamma, u, z_re, z_im, mode="bidirectional")
    assert nothing is None
    np.testing.assert_array_equal((last_re, last_im), (left_re[:, -1], left_im[:, -1]))
    matrix = dense_hamiltonian(v[1, :, 2], gamma[1, :, 2], u[1, :, 2], z_re[2], z_im[2])
    np.testing.assert_allclose(both_re[1, :, 2] + 1j * both_im[1, :, 2], np.diag(np.linalg.inv(matrix)), rtol=1e-9)
    for t in (1, 17, tokens):
        left = np.linalg.inv(matrix[:t, :t])[-1, -1]
        np.testing.assert_allclose(left_re[1, t - 1, 2] + 1j * left_im[1, t - 1, 2], left, rtol=1e-9)


@functools.cache
def compiled_gradients(mode, implementation):
    """Compiled once for each form: compilation is what these tests spend their time on."""

    def loss(inputs, reset, weights):
        v, gamma, u, z_re, z_im, initial_g = inputs
        initial_g = initial_g if mode == "causal" else None
        options = {"reset": reset, "mode": mode, "implementation": implementation}
        *g, final = resolvent_scan(v, gamma, u, z_re, z_im, initial_g, **options)
        return jnp.sum(weights[0] * jnp.stack(g)) + (0 if final is None else jnp.sum(weights[1] * jnp.stack(final)))

    return jax.jit(jax.value_and_grad(loss))


def gradients(mode, implementation, inputs, reset):
    rng = np.random.default_rng(2)
    shape = inputs[0].shape
    weights = rng.normal(size=(2, *shape)), rng.normal(size=(2, shape[0], shape[2]))
    return compiled_gradients(mode, implementation)(inputs, reset, weights)


@pytest.mark.parametrize(
    ("mode", "tokens", "per_token"),
    [("causal", 1, True), ("causal", 67, False), ("causal", 130, True), ("bidirectional", 67, True)],
)
@pytest.mark.usefixtures("x64")
def test_values_and_every_gradient_are_those_of_the_law(mode, tokens, per_token):
    inputs = make_inputs(tokens, per_token=per_token)
    reset = make_reset(tokens)
    expected = gradients(mode, "naive", inputs, reset)
    actual = gradients(mode, "xla", inputs, reset)
    # float64 rounding; a wrong term is of order 1.
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-9), actual, expected)


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.usefixtures("x64")
def test_gradients_are_the_finite_differences(mode):
    inputs = make_inputs(67)
    reset = make_reset(67)
    _, gradient = gradients(mode, "xla", inputs, reset)
    rng = np.random.default_rng(3)
    leaves, tree = jax.tree.flatten(inputs)
    for i, leaf in enumerate(leaves):
        direction = jnp.asarray(rng.normal(size=leaf.shape)) * 1e-6

        def moved(sign, i=i, direction=direction):
            changed = [x + sign * direction if j == i else x for j, x in enumerate(leaves)]
            return gradients(mode, "xla", jax.tree.unflatten(tree, changed), reset)[0]

        numeric = (moved(1) - moved(-1)) / 2
        analytic = jnp.sum(jax.tree.leaves(gradient)[i] * direction)
        # Steps of 1e-6: relative curvature error 1e-12 * |g|^2 with |g| up to 100, rounding 1e-15 / 1e-6.
        np.testing.assert_allclose(analytic, numeric, rtol=1e-5, atol=1e-13)


@pytest.mark.usefixtures("x64")
def test_any_chunk_length_gives_the_same():
    v, gamma, u, _, _, initial = make_inputs(50)
    expected = naive.scan((v, -gamma), u, initial)
    scan = jax.jit(chunked.scan, static_argnames="chunk")
    for chunk in (1, 7, 50, 64):
        actual = scan((v, -gamma), u, initial, chunk=chunk)
        np.testing.assert_allclose(np.stack(actual), np.stack(expected), rtol=1e-10)


@pytest.mark.parametrize("damping", [1.0, 1e-2, 1e-4])
@pytest.mark.usefixtures("x64")
def test_float32_is_as_good_as_the_plain_recursion(damping):
    rng = np.random.default_rng(0)
    shape = (2, 4096, HEADS)
    v, u = rng.normal(size=shape), np.ones(HEADS)
    inputs = (v, np.full(shape, damping / 2), u, np.zeros(HEADS), np.full(HEADS, damping / 2))
    single = [jnp.asarray(x, jnp.float32) for x in inputs]
    exact = np.stack(scan_jit(*(x.astype(jnp.float64) for x in single), implementation="naive")[:2])

    def error(implementation):
        g = np.stack(scan_jit(*single, implementation=implementation)[:2]).astype(np.float64)
        return np.linalg.norm(g - exact) / np.linalg.norm(exact)

    # Rounding is amplified by |g|, up to 1 / damping, in any order of operations; the order only reshuffles it.
    assert error("xla") < 1.5 * error("naive") + 1e-7
    assert error("xla") < 3e-8 / damping + 3e-7


def test_a_stream_in_two_parts_is_the_whole():
    v, gamma, u, z_re, z_im, initial = make_inputs(130, np.float32)
    reset = make_reset(130)
    *whole, last = scan_jit(v, gamma, u, z_re, z_im, initial, reset=reset)
    parts, g = [], initial
    for part in (slice(None, 65), slice(65, None)):
        *values, g = scan_jit(v[:, part], gamma[:, part], u[:, part], z_re, z_im, g, reset=reset[:, part])
        parts.append(jnp.stack(values))
    # float32 rounding amplified by |g|, which the damping of at least 1e-2 bounds by 100.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=2), jnp.stack(whole), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jnp.stack(g), jnp.stack(last), rtol=1e-4, atol=1e-5)


def test_later_tokens_never_change_earlier_values():
    v, gamma, u, z_re, z_im, initial = make_inputs(130, np.float32)
    other = make_inputs(130, np.float32, seed=9)
    reset = make_reset(130)
    before = jnp.stack(scan_jit(v, gamma, u, z_re, z_im, initial, reset=reset)[:2])
    for t in (1, 16, 100):
        mixed = [x.at[:, t:].set(o[:, t:]) for x, o in zip((v, gamma, u), other, strict=False)]
        changed = reset.at[:, t:].set(~reset[:, t:])
        after = jnp.stack(scan_jit(*mixed, z_re, z_im, initial, reset=changed)[:2])
        np.testing.assert_array_equal(after[:, :, :t], before[:, :, :t])
        assert (np.asarray(after[:, :, t:]) != np.asarray(before[:, :, t:])).any()


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
def test_a_reset_cuts_the_chain_in_two(mode):
    v, gamma, u, z_re, z_im, initial = make_inputs(130, np.float32)
    zero = jax.tree.map(jnp.zeros_like, initial)
    cut = jnp.zeros((2, 130), bool).at[:, 65].set(True)
    none = jnp.zeros((2, 65), bool)
    start = {"causal": (initial, zero), "bidirectional": (None, None)}[mode]
    whole = jnp.stack(scan_jit(v, gamma, u, z_re, z_im, start[0], reset=cut, mode=mode)[:2])
    for part, first in zip((slice(None, 65), slice(65, None)), start, strict=True):
        alone = scan_jit(v[:, part], gamma[:, part], u[:, part], z_re, z_im, first, reset=none, mode=mode)[:2]
        np.testing.assert_allclose(whole[:, :, part], jnp.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_works_under_vmap_remat_and_a_scan_over_layers():
    v, gamma, u, z_re, z_im, _ = make_inputs(33, np.float32)

    def layer(x):
        g_re, g_im, _ = resolvent_scan(x, gamma, u, z_re, z_im)
        return 0.1 * (g_re + g_im)

    def scanned(x):
        body = jax.checkpoint(jax.vmap(layer))
        return jnp.sum(jax.lax.scan(lambda x, _: (body(x), None), x, length=2)[0] ** 2)

    def plain(x):
        return sum(jnp.sum(layer(layer(row)) ** 2) for row in x)

    x = jnp.stack([v, v + 1])
    # Two layers amplify rounding by |g|^2 each; |g| is at most 100 and mostly below 10.
    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(x), jax.jit(jax.grad(plain))(x), rtol=1e-3, atol=1e-4)


@functools.cache
def gradients_for_any_input(mode):
    def loss(*inputs):
        *g, _ = resolvent_scan(*inputs, mode=mode, implementation="xla")
        return jnp.sum(g[0]) + jnp.sum(g[1]), g

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-40, 1.0, 1e4, 1e15]),
    damping=st.lists(st.sampled_from([1e-40, 1e-3, 0.5, 1e3, 1e12]), min_size=1, max_size=4),
    coupling=st.lists(st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 3.0, 1e3]), min_size=1, max_size=4),
    eps=st.sampled_from([1e-2, 1.0]),
)
def test_bounded_and_finite_for_any_input(mode, seed, scale, damping, coupling, eps):
    rng = np.random.default_rng(seed)
    shape = (1, 67, 2)
    v = rng.normal(size=shape) * scale
    gamma, u = rng.choice(damping, size=shape), rng.choice(coupling, size=shape)
    inputs = [jnp.asarray(x, jnp.float32) for x in (v, gamma, u, np.zeros(2), np.full(2, eps))]
    (_, (g_re, g_im)), gradient = gradients_for_any_input(mode)(*inputs)
    size = np.hypot(np.asarray(g_re, np.float64), np.asarray(g_im, np.float64))
    # The bound holds for the rounded denominator; its reciprocal rounds three more times.
    assert (size * (gamma + eps) <= 1 + 1e-6).all()
    assert (np.asarray(g_im) >= 0).all()
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))


def test_a_pole_is_large_and_finite():
    # u = -1 and x = -i, -i, 1 - i, 1 - i: g is i, then a pole, then nothing, then 1 / (1 - i).
    v = jnp.asarray([0.0, 0, 1, 1])[None, :, None]
    others = (jnp.full((1, 4, 1), 0.5), -jnp.ones(1), jnp.zeros(1), jnp.full(1, 0.5))
    for implementation in ("naive", "xla"):

        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(v, implementation=implementation):
            g_re, g_im, _ = scan_jit(v, *others, implementation=implementation)
            return g_re.sum() + g_im.sum(), g_im[0, :, 0]

        (_, g_im), gradient = loss(v)
        np.testing.assert_allclose(g_im[jnp.array([0, 2, 3])], [1, 0, 0.5], atol=1e-6)
        assert g_im[1] > 1e9
        assert bool(jnp.isfinite(gradient).all())

"""The resolvent and its gradient against dense inverses of the original's tridiagonal matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import resolvent_scan

REGIMES = {8: 4, 64: 4, 1024: 3}

scan = jax.jit(resolvent_scan, static_argnames=("mode", "implementation"))


@pytest.fixture(params=[8, pytest.param(64, marks=pytest.mark.slow), 1024])
def case(request, resolvents) -> dict[str, np.ndarray]:
    """All regimes of one length side by side as heads: arrays (B, N, H), z (H,)."""
    length = request.param
    names = [name for name in ("generic", "const_offdiag", "init", "dissipative") if f"{name}_{length}/a" in resolvents]
    assert len(names) == REGIMES[length]
    get = lambda key: np.stack([resolvents[f"{name}_{length}/{key}"] for name in names], axis=-1)  # noqa: E731
    zero = np.zeros_like(get("a"))
    zero[..., -1] = resolvents[f"dissipative_{length}/gamma"]
    coupling = get("b_super") * get("c_sub")
    # Only the product of the two off-diagonals of neighbours matters; the first token has no neighbour before it.
    u = np.pad(coupling, ((0, 0), (1, 0), (0, 0)))
    upstream = get("upstream")
    return {
        "a": get("a"),
        "gamma": zero,
        "u": u,
        "z": get("z"),
        "up_re": upstream[:, :, 0],
        "up_im": upstream[:, :, 1],
    } | {key: get(key) for key in ("G_diag", "g_left", "dL_da_exact")}


def arguments(case: dict[str, np.ndarray], dtype: jnp.dtype = jnp.float64) -> dict[str, jax.Array]:
    z_re, z_im = np.real(case["z"]), np.imag(case["z"])
    named = {"v_BxNxH": case["a"], "gamma_BxNxH": case["gamma"], "u": case["u"], "z_re": z_re, "z_im": z_im}
    return {name: jnp.asarray(x, dtype) for name, x in named.items()}


def relative_error(actual: jax.Array | np.ndarray, expected: np.ndarray) -> float:
    """Largest error of each regime relative to its largest value; the worst regime's."""
    error_H, size_H = (np.max(np.abs(x), axis=(0, 1)) for x in (np.asarray(actual) - expected, expected))
    return float(np.max(error_H / size_H))


# Both sides are float64; over 1,024 tokens of the worst conditioned regime two digits are lost (measured: 2e-14).
TOLERANCE = 1e-12


@pytest.mark.parametrize("implementation", ["naive", "xla"])
@pytest.mark.parametrize(("mode", "key"), [("causal", "g_left"), ("bidirectional", "G_diag")])
def test_green_functions(case, mode, key, implementation):
    with jax.enable_x64(True):
        g_re, g_im, _ = scan(**arguments(case), mode=mode, implementation=implementation)
        assert relative_error(g_re + 1j * g_im, case[key]) < TOLERANCE


def test_gradient_of_the_diagonal_is_the_exact_one(case):
    with jax.enable_x64(True):
        named = arguments(case)

        @jax.jit
        @jax.grad
        def gradient(a: jax.Array) -> jax.Array:
            others = named["gamma_BxNxH"], named["u"], named["z_re"], named["z_im"]
            g_re, g_im, _ = resolvent_scan(a, *others, mode="bidirectional")
            return jnp.sum(g_re * case["up_re"] + g_im * case["up_im"])

        assert relative_error(gradient(named["v_BxNxH"]), case["dL_da_exact"]) < TOLERANCE


def test_float32_holds_where_the_original_underflowed(case):
    """It returned zeros or values clipped at 50 from some twenty tokens on."""
    g_re, g_im, _ = scan(**arguments(case, jnp.float32), mode="bidirectional")
    # Values up to 18 at distances of 0.1 from the spectrum amplify float32's 6e-8 some hundredfold.
    assert relative_error(g_re + 1j * g_im, case["G_diag"]) < 1e-4

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.physics import zeta


def test_table_holds_the_true_zeros_in_order():
    for n in (1, 2, 10, 127, 649, 2048):
        with mpmath.workdps(20):
            assert zeta.zeta_zeros(n)[-1] == float(mpmath.zetazero(n).imag)
    assert np.all(np.diff(zeta.zeta_zeros(2048)) > 0)


def test_no_zero_is_missing():
    # θ/π + 1 counts zeros up to a fluctuation below 2 at these heights, so a gap or a double would shift all later x_j.
    deviation = zeta.unfolded_zeros(2048) - (np.arange(1, 2049) - 0.5)
    assert np.max(np.abs(deviation)) < 1.5
    assert abs(np.mean(deviation[-200:])) < 0.05


def test_asking_beyond_the_table_is_refused_with_its_size():
    with pytest.raises(ValueError, match=r"9999.*2048"):
        zeta.zeta_zeros(9999)
    with pytest.raises(ValueError, match="-1"):
        zeta.zeta_zeros(-1)


def test_table_and_basis_cannot_be_overwritten():
    with pytest.raises(ValueError, match="read-only"):
        zeta.zeta_zeros(3)[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        zeta.resonance_basis(4)[0, 0] = 0


@pytest.mark.parametrize("t", [0.0, 0.5, 14.134725, 200.0, 2515.3])
def test_theta_agrees_with_mpmath(t):
    # θ(2515) is 6,300; float64 leaves 1e-12 of it.
    np.testing.assert_allclose(
        zeta.riemann_siegel_theta(np.array(t)), float(mpmath.siegeltheta(t)), rtol=1e-14, atol=1e-12
    )


def turns(position: int, zero: float) -> float:
    """position·ζ/4π² modulo 1 to far more digits than float64 keeps."""
    with mpmath.workdps(50):
        return float(mpmath.frac(position * mpmath.mpf(zero) / (4 * mpmath.pi**2)))


@given(position=st.integers(0, 2**31 - 1), index=st.integers(0, 127))
def test_position_embedding_is_right_at_any_position(position, index):
    width = 256
    sine, cosine = np.asarray(zeta.position_embedding(jnp.int32(position), width))[2 * index : 2 * index + 2]
    angle = 2 * np.pi * turns(position, float(zeta.zeta_zeros(128)[index]))
    # 48 bits of frequency times 2³¹ positions leave 2⁻¹⁸ turns = 2.4e-5 rad; float32 adds 2e-7.
    np.testing.assert_allclose([sine, cosine], [np.sin(angle), np.cos(angle)], atol=4e-5)


def test_position_embedding_of_early_positions_is_float32_exact():
    embedding_NxD = np.asarray(jax.jit(lambda n: zeta.position_embedding(n + jnp.arange(64), 32))(1000))
    angles_NxF = np.outer(np.arange(1000, 1064), zeta.zeta_zeros(16) / (2 * np.pi))
    # float64 angles of 1,064·ζ/2π ≈ 1e4 err by 1e-12; what remains is float32's 2e-7 on an angle up to π.
    np.testing.assert_allclose(embedding_NxD[:, 0::2], np.sin(angles_NxF), atol=5e-7)
    np.testing.assert_allclose(embedding_NxD[:, 1::2], np.cos(angles_NxF), atol=5e-7)
    assert embedding_NxD.dtype == np.float32


def test_position_embedding_keeps_leading_axes():
    positions_BxN = jnp.array([[0, 5, 7], [2**31 - 1, 1, 0]])
    both_BxNxD = zeta.position_embedding(positions_BxN, 8)
    assert both_BxNxD.shape == (2, 3, 8)
    np.testing.assert_array_equal(both_BxNxD[1], zeta.position_embedding(positions_BxN[1], 8))


def test_position_embedding_refuses_what_it_cannot_lay_out():
    with pytest.raises(ValueError, match="7 must be even"):
        zeta.position_embedding(jnp.arange(3), 7)
    with pytest.raises(ValueError, match="needs 4 zeros"):
        zeta.position_embedding(jnp.arange(3), 8, np.ones(3))
    with pytest.raises(ValueError, match="5000"):
        zeta.position_embedding(jnp.arange(3), 10_000)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (1, 16), (16, 1), (4, 8, 24)])
def test_initializer_gives_the_spectrum_and_keeps_the_norm(shape):
    standard = jax.nn.initializers.lecun_normal()
    draw = standard(jax.random.key(3), shape, jnp.float32).reshape(-1, shape[-1])
    made = zeta.zeta_initializer(standard)(jax.random.key(3), shape, jnp.float32)
    assert made.shape == shape
    values = np.linalg.svd(np.asarray(made).reshape(-1, shape[-1]), compute_uv=False)
    # float32 SVDs of matrices this small err by 1e-6 of the largest value.
    expected = zeta.zeta_zeros(len(values))[0] / zeta.zeta_zeros(len(values))
    np.testing.assert_allclose(values / values[0], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(made), np.linalg.norm(draw), rtol=1e-5)


def test_initializer_keeps_the_directions_of_the_draw():
    standard = jax.nn.initializers.orthogonal()
    draw = np.asarray(standard(jax.random.key(0), (8, 8), jnp.float32)) @ np.diag(np.arange(8, 0, -1.0))
    made = np.asarray(
        zeta.zeta_initializer(lambda key, shape, dtype=None, out_sharding=None: jnp.asarray(draw))(
            jax.random.key(0), (8, 8), jnp.float32
        )
    )
    (left, _, right), (left_made, _, right_made) = np.linalg.svd(draw), np.linalg.svd(made)
    # Singular vectors are defined up to a common sign of each pair.
    overlap = np.sum(left * left_made, axis=0) * np.sum(right * right_made, axis=1)
    np.testing.assert_allclose(overlap, 1, atol=1e-4)


def test_initializer_honours_the_dtype_asked_for():
    made = zeta.zeta_initializer(jax.nn.initializers.lecun_normal())(jax.random.key(0), (8, 8), jnp.bfloat16)
    assert made.dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [1, 4, 8, 16, 32, 64, 128, 256])
def test_resonance_basis_is_the_unitary_matrix_nearest_to_its_frequencies(size):
    basis, frequencies = zeta.resonance_basis(size), zeta.frequency_matrix(size)
    assert basis.dtype == np.complex128
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(size), atol=1e-12)
    # Nearest unitary matrix = polar factor: what remains is Hermitian and positive. With QR it would be triangular.
    remainder = basis.conj().T @ frequencies
    np.testing.assert_allclose(remainder, remainder.conj().T, atol=1e-12)
    assert np.linalg.eigvalsh(remainder)[0] > 0


@pytest.mark.parametrize(("size", "condition"), [(32, 2.70), (64, 3.88), (128, 4.56), (256, 6.27)])
def test_frequency_matrix_is_well_conditioned(size, condition):
    np.testing.assert_allclose(np.linalg.cond(zeta.frequency_matrix(size)), condition, atol=0.006)


def test_raw_zeros_would_be_nearly_singular():
    size = 64
    raw = np.exp(2j * np.pi / size * np.outer(np.arange(size), zeta.zeta_zeros(size))) / np.sqrt(size)
    assert np.linalg.cond(raw) > 1e4


def test_resonance_basis_is_the_same_array_every_time():
    assert zeta.resonance_basis(16) is zeta.resonance_basis(16)

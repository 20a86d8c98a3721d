"""What the model takes from the zeros ½ + iζ_j of Riemann's zeta function: frequencies, a spectrum, a unitary basis."""

import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import loggamma

TABLE = "zeta_zeros.npy"
TABLE_SIZE = 2048


@functools.cache
def _table() -> np.ndarray:
    with resources.files("phase2_jax.physics").joinpath(TABLE).open("rb") as file:
        table = np.load(file)
    table.setflags(write=False)
    return table


def zeta_zeros(n: int) -> np.ndarray:
    """Imaginary parts ζ_1 < ζ_2 < … of the first n non-trivial zeros, `(n,)` float64, read-only.

    Source: `mpmath.zetazero`, see zeta_zeros.txt beside the table.

    Raises:
      ValueError: n is negative or beyond the table.
    """
    table = _table()
    if not 0 <= n <= len(table):
        raise ValueError(f"{n} zeta zeros asked for; the table {TABLE} holds the first {len(table)}")
    return table[:n]


def riemann_siegel_theta(t: np.ndarray) -> np.ndarray:
    """θ(t) = Im ln Γ(¼ + it/2) − (t/2)·ln π in radians, float64, for t ≥ 0.

    On average θ(t)/π + 1 zeros lie below height t.
    """
    t = np.asarray(t, np.float64)
    return loggamma(0.25 + 0.5j * t).imag - 0.5 * t * np.log(np.pi)


def unfolded_zeros(n: int) -> np.ndarray:
    """x_j = θ(ζ_j)/π + 1, the zeros on the scale where their mean spacing is 1 (x_j ≈ j − ½), `(n,)` float64.

    Raises:
      ValueError: n is beyond the table.
    """
    return riemann_siegel_theta(zeta_zeros(n)) / np.pi + 1


def _frequency_words(zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """frac(ζ/4π²) in turns per token as a 48-bit fraction: its upper 32 bits and lower 16 bits, both uint32."""
    turns = np.asarray(zeros, np.float64) / (4 * np.pi**2) % 1.0
    fraction = np.round(turns * 2.0**48).astype(np.uint64) % np.uint64(2**48)
    return (fraction >> np.uint64(16)).astype(np.uint32), (fraction & np.uint64(0xFFFF)).astype(np.uint32)


def position_embedding(positions: jax.Array | np.ndarray, width: int, zeros: np.ndarray | None = None) -> jax.Array:
    """sin and cos of position·ζ_i/2π radians, interleaved: column 2i is the sine, column 2i + 1 the cosine.

    The phase is reduced modulo one turn in 32-bit integers, so it holds to the last position (4e-5 rad at 2³¹); in
    float32 it would be noise from a few hundred thousand tokens on.

    Args:
      positions: `(...)` integers in [0, 2³¹), may be traced.
      width: even number of columns; the first width/2 zeros are used.
      zeros: `(width/2,)` other frequencies ζ_i ≥ 0.

    Returns:
      `(..., width)` float32.

    Raises:
      ValueError: width is odd, or beyond twice the table, or does not fit `zeros`.
    """
    if width % 2:
        raise ValueError(f"a zeta position embedding pairs sines with cosines: width {width} must be even")
    zeros = zeta_zeros(width // 2) if zeros is None else np.asarray(zeros)
    if zeros.shape != (width // 2,):
        raise ValueError(f"width {width} needs {width // 2} zeros, got shape {zeros.shape}")
    upper, lower = (jnp.asarray(word) for word in _frequency_words(zeros))
    position = jnp.asarray(positions).astype(jnp.uint32)[..., None]
    # (position · fraction) >> 16 modulo 2³²; the lower word's share comes from two products that fit 32 bits.
    carried = (position >> 16) * lower + (((position & 0xFFFF) * lower) >> 16)
    phase = position * upper + carried
    turn = jax.lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32)
    angle = turn * np.float32(2 * np.pi / 2**32)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*angle.shape[:-1], width)


def zeta_initializer(standard: jax.nn.initializers.Initializer) -> jax.nn.initializers.Initializer:
    """Initialiser of matrices with singular values ∝ 1/ζ_i.

    Singular vectors and Frobenius norm are those of a draw from `standard`.
    The last axis is one side of the matrix, all others together the other side.

    Raises (when called):
      ValueError: the shorter side is longer than the table.
    """

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None) -> jax.Array:
        if out_sharding is not None:
            raise ValueError("the zeta initialiser draws whole matrices: shard its result, not its draw")
        dtype = jnp.float32 if dtype is None else dtype
        draw = standard(key, shape, jnp.promote_types(dtype, jnp.float32))
        left, values, right = jnp.linalg.svd(draw.reshape(-1, shape[-1]), full_matrices=False)
        spectrum = 1 / zeta_zeros(values.shape[0])
        spectrum = jnp.asarray(spectrum / np.linalg.norm(spectrum), values.dtype) * jnp.linalg.norm(values)
        return ((left * spectrum) @ right).reshape(shape).astype(dtype)

    return init


def frequency_matrix(size: int) -> np.ndarray:
    """exp(2πi·x_j·k/K)/√K of row k and column j for the first K unfolded zeros, `(K, K)` complex128; nearly Fourier.

    Unfolding is what makes it well conditioned: 2.7 at K = 32, 6.3 at 256, 12 at 1,024. Raw zeros modulo K nearly
    collide, with condition numbers up to 1e15.
    """
    rows = np.arange(size)[:, None]
    return np.exp(2j * np.pi / size * rows * unfolded_zeros(size)) / np.sqrt(size)


@functools.cache
def resonance_basis(size: int) -> np.ndarray:
    """The unitary matrix nearest to `frequency_matrix(size)`, `(K, K)` complex128, read-only; column j is mode j.

    It is the unitary polar factor, which keeps each column at its own frequency; a QR factorisation would smear later
    columns over all earlier ones.

    Raises:
      ValueError: size is beyond the table.
    """
    left, _, right = np.linalg.svd(frequency_matrix(size))
    basis = left @ right
    basis.setflags(write=False)
    return basis

"""SNR selection: components of the fast weights that stand out of the noise are kept, the others fade faster."""

import jax
import jax.numpy as jnp

# Keeps the ratio finite for an empty memory, as in the original.
SIGMA_FLOOR = 1e-6
# Ratios are cut here before their fourth power, so that thresholds down to 0 stay finite in float32.
LARGEST_RATIO = 1e4


def _std(x: jax.Array, axis: int | tuple[int, ...] | None, ddof: int) -> jax.Array:
    variance = jnp.var(x, axis=axis, ddof=ddof, keepdims=True)
    # sqrt has an infinite slope at 0, where an empty memory stands.
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def snr_ratio(w_BxHxKxV: jax.Array, axis: int | tuple[int, ...] | None = (-2, -1), ddof: int = 0) -> jax.Array:
    """|W| / σ with σ = std(W) + 1e-6 over `axis`; same shape as `w`."""
    return jnp.abs(w_BxHxKxV) / (_std(w_BxHxKxV, axis, ddof) + SIGMA_FLOOR)


def low_weight(ratio: jax.Array, threshold: float) -> jax.Array:
    """Membership in the noise, 1 / (1 + (ratio / threshold)⁴) in [0, 1].

    Soft, because a hard comparison flips with rounding: a stream cut differently would store something else.
    """
    if threshold == 0:
        return jnp.zeros_like(ratio)
    relative = jnp.minimum(ratio / threshold, LARGEST_RATIO)
    return 1 / (1 + jnp.square(jnp.square(relative)))


def mean_decay_of_writes(decay: jax.Array) -> jax.Array:
    """Γ̂ = 1 − Γ̄ / (e^Γ̄ − 1): decay seen on average by what was written evenly over an interval of total decay Γ̄ ≥ 0."""
    small = decay < 1e-2
    safe = jnp.where(small, 1, decay)
    exact = 1 - safe * jnp.exp(-safe) / -jnp.expm1(-safe)
    # Next term of the series is Γ̄⁴/720, below float32's resolution of the result.
    return jnp.where(small, decay / 2 - jnp.square(decay) / 12, exact)


def select(
    w_BxHxKxV: jax.Array, decay_BxH: jax.Array, threshold: float, gamma_boost: float
) -> tuple[jax.Array, jax.Array]:
    """Let low components decay as if their Γ had been `gamma_boost` times as large since the last consolidation.

    Returns:
      the selected weights `(B, H, K, V)` and the share of high components r = mean(1 − low) `(B, H)`, which raises
      the next writes.
    """
    low_BxHxKxV = low_weight(snr_ratio(w_BxHxKxV), threshold)
    extra_BxH = (gamma_boost - 1) * mean_decay_of_writes(decay_BxH)
    kept_BxHxKxV = w_BxHxKxV * jnp.exp(-extra_BxH[..., None, None] * low_BxHxKxV)
    return kept_BxHxKxV, 1 - jnp.mean(low_BxHxKxV, axis=(-2, -1))


def statistics(w_BxHxKxV: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """Mean of |W|/σ and share of components below `threshold`, each `(B, H)`."""
    ratio_BxHxKxV = snr_ratio(w_BxHxKxV)
    low_BxHxKxV = (ratio_BxHxKxV < threshold).astype(w_BxHxKxV.dtype)
    return jnp.mean(ratio_BxHxKxV, axis=(-2, -1)), jnp.mean(low_BxHxKxV, axis=(-2, -1))

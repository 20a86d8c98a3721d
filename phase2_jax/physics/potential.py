"""Forgetting rates: how half-lives become the biases of the potential Γ = base_decay + softplus(w·x + b)."""

import numpy as np

LN2 = float(np.log(2.0))


def longest_half_life(base_decay: float, dt: float) -> float:
    """Longest half-life (tokens) a head may be given at initialisation: half of the cap ln2 / (base_decay·dt)."""
    return 0.5 * LN2 / (base_decay * dt)


def half_lives(num_heads: int, shortest: float, longest: float) -> np.ndarray:
    """Half-lives in tokens spread log-uniformly over the heads, `(H,)` float64; one head gets their geometric mean."""
    if num_heads == 1:
        return np.array([np.sqrt(shortest * longest)])
    return np.geomspace(shortest, longest, num_heads)


def softplus_inverse(y: np.ndarray) -> np.ndarray:
    """x with log(1 + exp(x)) = y for y > 0, accurate for tiny and large y."""
    return y + np.log(-np.expm1(-y))


def gamma_bias(half_lives_H: np.ndarray, base_decay: float, dt: float) -> np.ndarray:
    """Bias b_Γ with base_decay + softplus(b_Γ) = ln2 / (half-life · dt), `(H,)` float64.

    Raises:
      ValueError: a half-life is not shorter than the cap ln2 / (base_decay · dt), so no bias reaches it.
    """
    rate_H = LN2 / (np.asarray(half_lives_H, np.float64) * dt) - base_decay
    if np.any(rate_H <= 0):
        raise ValueError(
            f"half-life {np.max(half_lives_H):.1f} is beyond the cap {LN2 / (base_decay * dt):.1f} "
            f"of base_decay {base_decay}"
        )
    return softplus_inverse(rate_H)

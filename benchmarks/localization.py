"""How fast the resolvent forgets random tokens when nothing dissipates: the Lyapunov exponent of its maps.

    python benchmarks/localization.py

g_t = 1 / (x_t - g_{t-1}) at Γ = ε = 0 and coupling 1 turns g about a fixed point by an angle 2θ with x = 2 cos θ. Two
states approach each other by exp(-2λ) a token, where λ is the growth of products of [[0, 1], [-1, x_t]]. Rows are
pairs of potentials, drawn with equal chance, by the difference of their angles; the smallest λ over all such pairs.
"""

import numpy as np
from absl import app, flags

_TOKENS = flags.DEFINE_integer("tokens", 10_000, "Tokens of a chain, after a tenth as many that do not count.")
_CHAINS = flags.DEFINE_integer("chains", 64, "Chains with tokens of their own.")


def exponent(potentials: tuple[float, float], rng: np.random.Generator) -> float:
    """λ per token of random sequences of both potentials."""
    vectors = np.tile([1.0, 0.3], (_CHAINS.value, 1))
    growth = np.zeros(_CHAINS.value)
    for token in range(-_TOKENS.value // 10, _TOKENS.value):
        x = np.asarray(potentials)[rng.integers(0, 2, _CHAINS.value)]
        vectors = np.stack([vectors[:, 1], x * vectors[:, 1] - vectors[:, 0]], axis=1)
        lengths = np.linalg.norm(vectors, axis=1)
        growth, vectors = growth + (token >= 0) * np.log(lengths), vectors / lengths[:, None]
    return float(growth.mean() / _TOKENS.value)


def main(argv: list[str]) -> None:
    del argv
    rng = np.random.default_rng(0)
    print("difference of 2θ, degrees   λ a token   tokens until two states are half as far apart")
    for degrees in (10, 30, 60, 90, 180):
        half = np.radians(degrees) / 2
        angles = np.linspace(0, np.pi - half, 33)
        least = min(exponent((2 * np.cos(first), 2 * np.cos(first + half)), rng) for first in angles)
        print(f"{degrees:25d} {least:11.5f} {np.log(2) / (2 * least):13.1f}")


if __name__ == "__main__":
    app.run(main)

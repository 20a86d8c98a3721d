"""Sums over scored tokens, and the figures made of them."""

import math
from typing import Any

import numpy as np

from phase2_jax.inference.windows import TextCounts
from phase2_jax.training.records import DIAGNOSTIC_KEYS, PER_LAYER_KEYS, perplexity

# The mean over the layers of a per-layer figure, under the name it has in a run's records.
_MEANS = {
    "mean_gamma": "gamma_mean",
    "mean_snr": "snr_mean",
    "low_snr_ratio": "snr_low_ratio",
    "num_resonant_modes": "resonant_modes",
    "total_resonance_energy": "resonance_energy",
    "lyapunov_stable_ratio": "stable_ratio",
    "mean_fast_weight_energy": "energy",
}
# What says something about the fast weights, and nothing where they are all zero: no memory, or nothing ever written.
_OF_WEIGHTS = ("snr_mean", "snr_low_ratio", "resonant_modes", "resonance_energy", "stable_ratio", "energy_change")


class Tally:
    """Loss (nats) and right answers over some tokens."""

    def __init__(self):
        self.tokens, self.loss, self.right = 0, 0.0, 0

    def add(self, loss_N: np.ndarray, right_N: np.ndarray) -> None:
        """Count tokens; sums are float64 whatever the arrays are."""
        self.tokens += len(loss_N)
        self.loss += float(np.sum(loss_N, dtype=np.float64))
        self.right += int(np.sum(right_N))

    def result(self) -> dict[str, Any]:
        """Number of tokens and means over them, None where there are none."""
        if not self.tokens:
            return {"tokens": 0, "loss": None, "accuracy": None}
        return {"tokens": self.tokens, "loss": self.loss / self.tokens, "accuracy": self.right / self.tokens}


class Scores:
    """Everything that one way of reading a text gives."""

    def __init__(self):
        self.all, self.seen, self.new = Tally(), Tally(), Tally()
        self._places: dict[int, Tally] = {}
        self._figures = _Figures()

    def add(
        self,
        loss_N: np.ndarray,
        right_N: np.ndarray,
        positions_N: np.ndarray,
        seen_N: np.ndarray,
        layers: dict[str, np.ndarray],
        *,
        whole: bool,
    ) -> None:
        """Count a window: of every label its loss, whether it was the likeliest token, its place in its document,
        whether it occurred there before; and the figures of the layers over the window, `(L,)` each, of which only
        those of Γ count where the window is not `whole`.
        """
        self.all.add(loss_N, right_N)
        self.seen.add(loss_N[seen_N], right_N[seen_N])
        self.new.add(loss_N[~seen_N], right_N[~seen_N])
        # Bit length of the place: 0, 1, 2 and 3, 4 to 7, 8 to 15 and so on.
        places_N = np.frexp(positions_N.astype(np.float64))[1]
        for place in np.unique(places_N).tolist():
            here_N = places_N == place
            self._places.setdefault(place, Tally()).add(loss_N[here_N], right_N[here_N])
        self._figures.add(layers, len(loss_N), whole)

    def result(self, counts: TextCounts, word_level: bool) -> dict[str, Any]:
        """Figures by name, None where they mean nothing for this tokenizer."""
        nats, tokens = self.all.loss, self.all.tokens
        scored_bytes = counts.num_bytes - counts.first_bytes
        loss = nats / tokens
        per_word = loss if word_level else nats / counts.num_words if counts.lossless and counts.num_words else None
        return {
            **self.all.result(),
            "perplexity": perplexity(loss),
            "bits_per_byte": nats / (scored_bytes * math.log(2)) if counts.lossless and scored_bytes else None,
            "word_perplexity": perplexity(per_word),
            "seen": self.seen.result(),
            "new": self.new.result(),
            "by_position": [
                {"first": 2 ** (place - 1) if place else 0, "last": 2**place - 1, **tally.result()}
                for place, tally in sorted(self._places.items())
            ],
            **self._figures.result(),
        }


class _Figures:
    """Γ over all tokens together; the memory's figures as means over the ends of the whole windows."""

    def __init__(self):
        self._tokens, self._whole_tokens = 0, 0
        self._sums: dict[str, np.ndarray] = dict.fromkeys(PER_LAYER_KEYS, np.zeros(()))
        self._square_L = np.zeros(())
        self._least_L, self._most_L = np.full((), np.inf), np.full((), -np.inf)

    def add(self, layers: dict[str, np.ndarray], tokens: int, whole: bool) -> None:
        layers = {name: np.asarray(value, np.float64) for name, value in layers.items()}
        self._tokens += tokens
        self._whole_tokens += tokens * whole
        for name in PER_LAYER_KEYS if whole else ("gamma_mean",):
            self._sums[name] = self._sums[name] + tokens * layers[name]
        self._square_L = self._square_L + tokens * (layers["gamma_mean"] ** 2 + layers["gamma_std"] ** 2)
        self._least_L = np.minimum(self._least_L, layers["gamma_min"])
        self._most_L = np.maximum(self._most_L, layers["gamma_max"])

    def result(self) -> dict[str, Any]:
        per_layer = {name: value / max(self._whole_tokens, 1) for name, value in self._sums.items()}
        mean_L, square_L = self._sums["gamma_mean"] / self._tokens, self._square_L / self._tokens
        per_layer |= {
            "gamma_mean": mean_L,
            "gamma_std": np.sqrt(np.maximum(square_L - mean_L**2, 0)),
            "gamma_min": self._least_L,
            "gamma_max": self._most_L,
        }
        figures = {key: float(np.mean(per_layer[name])) for key, name in _MEANS.items()}
        figures["std_gamma"] = math.sqrt(max(float(np.mean(square_L)) - figures["mean_gamma"] ** 2, 0))
        figures["min_gamma"], figures["max_gamma"] = float(np.min(self._least_L)), float(np.max(self._most_L))
        result: dict[str, Any] = {key: figures[key] for key in DIAGNOSTIC_KEYS}
        layers: dict[str, list[float | None]] = {name: value.tolist() for name, value in per_layer.items()}
        if not np.any(per_layer["energy"]):
            result |= {key: None for key, name in _MEANS.items() if name in _OF_WEIGHTS}
            layers |= {name: [None] * len(layers["energy"]) for name in _OF_WEIGHTS}
        return result | {"per_layer": layers}

"""From a step's device metrics to the records of `phase2_jax.training.records`."""

import dataclasses
import math
import time
from typing import Any

import numpy as np

from phase2_jax.errors import UserError
from phase2_jax.memory.diagnostics import MemoryDiagnostics
from phase2_jax.training.records import PER_LAYER_KEYS, Record

MEBIBYTE = 2**20
# Γ from long memories (half-life 7,000 tokens) to instant forgetting.
GAMMA_EDGES = np.geomspace(1e-4, 10.0, 41)


class TrainingDiverged(UserError):
    """Loss or gradient were not finite; the state before that step is kept."""


class Throughput:
    """Tokens per second and MFU between the arrivals of step metrics."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
        self._tokens = tokens_per_step
        self._flops = flops_per_token
        self._peak = peak_flops
        self._last = time.perf_counter()
        self._only_a_step = False

    def lap(self) -> float:
        """Seconds since the last lap, in which something else than a step happened (compilation, validation)."""
        now = time.perf_counter()
        last, self._last = self._last, now
        self._only_a_step = False
        return now - last

    def tick(self) -> tuple[float | None, float | None, float]:
        """(tokens/s, MFU, seconds) of the step that just arrived; no rates for the first one after a lap."""
        only_a_step = self._only_a_step
        seconds = self.lap()
        self._only_a_step = True
        if not only_a_step:
            return None, None, seconds
        rate = self._tokens / max(seconds, 1e-9)
        return rate, None if self._peak is None else rate * self._flops / self._peak, seconds


def memory_in_use(device: Any) -> tuple[float | None, float | None]:
    """Peak and current memory of a device in MiB; None where it does not tell (CPU)."""
    stats = device.memory_stats()
    if not stats:
        return None, None
    return stats["peak_bytes_in_use"] / MEBIBYTE, stats["bytes_in_use"] / MEBIBYTE


def memory_limit(device: Any) -> int | None:
    """Bytes that a device has for arrays; None where it does not tell (CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit")


def step_record(metrics: dict[str, Any], *, step: int, epoch: int) -> Record:
    """The record of a step from its fetched metrics, without throughput and device memory.

    Raises:
      TrainingDiverged: the step's loss or gradient was not finite.
    """
    layers: MemoryDiagnostics = metrics["layers"]
    per_layer = {name: [float(x) for x in getattr(layers, name)] for name in PER_LAYER_KEYS}
    if int(metrics["failed_step"]):
        raise TrainingDiverged(_divergence(metrics, step))
    means = {name: float(np.mean(np.asarray(values, np.float64))) for name, values in per_layer.items()}
    second = np.mean(np.square(per_layer["gamma_std"]) + np.square(per_layer["gamma_mean"]))
    return {
        "step": step,
        "epoch": epoch,
        "loss": float(metrics["loss"]),
        "learning_rate": float(metrics["learning_rate"]),
        "grad_norm": float(metrics["grad_norm"]),
        "mean_gamma": means["gamma_mean"],
        "std_gamma": math.sqrt(max(float(second) - means["gamma_mean"] ** 2, 0.0)),
        "min_gamma": min(per_layer["gamma_min"]),
        "max_gamma": max(per_layer["gamma_max"]),
        "mean_snr": means["snr_mean"],
        "low_snr_ratio": means["snr_low_ratio"],
        "num_resonant_modes": means["resonant_modes"],
        "total_resonance_energy": means["resonance_energy"],
        "lyapunov_stable_ratio": means["stable_ratio"],
        "mean_fast_weight_energy": means["energy"],
        "per_layer": per_layer,
    }


def _divergence(metrics: dict[str, Any], step: int) -> str:
    layers: MemoryDiagnostics = metrics["layers"]
    figures = {field.name: np.asarray(getattr(layers, field.name)) for field in dataclasses.fields(layers)}
    bad = np.array([not np.isfinite(values).all() for values in np.stack(list(figures.values()), axis=1)])
    where = "the figures of every layer are finite, the loss or a gradient is not"
    if bad.any():
        layer = int(bad.argmax())
        names = ", ".join(name for name, values in figures.items() if not np.isfinite(values[layer]))
        where = f"layer {layer} is the first that went bad ({names})"
    return (
        f"step {step}: loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}; {where}. "
        "Lower optimizer.learning_rate or raise optimizer.warmup_steps, in another --workdir"
    )


def gamma_histogram(gamma_LxBxNxP: np.ndarray) -> dict[str, Any]:
    """Counts of Γ per layer over fixed logarithmic bins; values beyond the ends count in the end bins."""
    clipped = np.clip(gamma_LxBxNxP, GAMMA_EDGES[0], GAMMA_EDGES[-1])
    counts = [np.histogram(layer, bins=GAMMA_EDGES)[0].tolist() for layer in clipped]
    return {"edges": GAMMA_EDGES.tolist(), "counts": counts}


def gamma_heatmap(gamma_LxBxNxP: np.ndarray) -> list[list[float]]:
    """Γ of the first row, mean over heads, `[L][N]`."""
    gamma_LxN = np.asarray(np.mean(gamma_LxBxNxP[:, 0], axis=-1, dtype=np.float64))
    return [row.tolist() for row in gamma_LxN]

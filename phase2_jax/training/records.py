"""Names of everything a run records, and their tags in TensorBoard and Weights & Biases.

A step record is a dict of Python floats (None where a figure is not available) with the keys ``step`` and ``epoch``
(both count from 1), ``STEP_KEYS``, ``DIAGNOSTIC_KEYS`` and ``per_layer``: a dict of the lists ``PER_LAYER_KEYS`` with
one entry a layer. An epoch record has the same diagnostics as means over the epoch's steps, and ``train_loss``,
``val_loss``, ``val_accuracy`` (share of tokens that were the likeliest), ``learning_rate``, ``epoch_time`` (seconds),
``gamma_histogram`` ({"edges": [bins + 1], "counts": [L][bins]}) and ``gamma_heatmap`` ([L][N], the forgetting rate of
one validation sequence). ``sample_text`` is None or a pair (prompt, continuation) written by the model.

``lyapunov_stable_ratio`` and ``stable_ratio`` are the share of heads whose energy E = ||W||² grew by at most a tenth of
what was written over the last consolidation interval: E_end - E_start <= 0.1 * sum of max(S_c, 0), where the supply of
chunk c is S_c = E_c - exp(-2 * its accumulated decay) * E_(c-1). ``energy_change`` is that E_end - E_start.
``coherence`` is ||W|| over its bound if no two writes cancelled. `phase2_jax.memory.diagnostics` describes the others.
"""

import math
from typing import Any

Record = dict[str, Any]

STEP_KEYS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "peak_vram_mb", "current_vram_mb")
DIAGNOSTIC_KEYS = (
    "mean_gamma",
    "std_gamma",
    "min_gamma",
    "max_gamma",
    "mean_snr",
    "low_snr_ratio",
    "num_resonant_modes",
    "total_resonance_energy",
    "lyapunov_stable_ratio",
    "mean_fast_weight_energy",
)
PER_LAYER_KEYS = (
    "gamma_mean",
    "gamma_std",
    "gamma_min",
    "gamma_max",
    "snr_mean",
    "snr_low_ratio",
    "resonant_modes",
    "resonance_energy",
    "stable_ratio",
    "energy",
    "energy_change",
    "coherence",
    "overdamped_ratio",
)
PICTURE_KEYS = ("gamma_histogram", "gamma_heatmap", "sample_text")

# The figures that the original reported both for a batch and for an epoch, under these short names.
_SHARED_TAGS = {
    "gamma_mean": "mean_gamma",
    "gamma_std": "std_gamma",
    "gamma_min": "min_gamma",
    "gamma_max": "max_gamma",
    "snr_mean": "mean_snr",
    "snr_low_ratio": "low_snr_ratio",
    "resonant_modes": "num_resonant_modes",
    "resonance_energy": "total_resonance_energy",
    "stability_ratio": "lyapunov_stable_ratio",
    "fast_weight_energy": "mean_fast_weight_energy",
}
_BATCH_TAGS = {f"batch/{tag}": key for tag, key in _SHARED_TAGS.items()} | {
    "batch/loss": "loss",
    "batch/vram_mb": "peak_vram_mb",
    "batch/learning_rate": "learning_rate",
    "batch/grad_norm": "grad_norm",
    "batch/tokens_per_second": "tokens_per_second",
    "batch/mfu": "mfu",
}
_EPOCH_TAGS = {f"train/{tag}": key for tag, key in _SHARED_TAGS.items()} | {
    "epoch": "epoch",
    "learning_rate": "learning_rate",
    "train/loss": "train_loss",
    "train/epoch_time": "epoch_time",
    "train/peak_vram_mb": "peak_vram_mb",
    "train/tokens_per_second": "tokens_per_second",
    "val/loss": "val_loss",
    "val/accuracy": "val_accuracy",
}
_LAYER_TAGS = {
    "gamma": "gamma_mean",
    "snr": "snr_mean",
    "resonance": "resonant_modes",
    "stability": "stable_ratio",
    "energy": "energy",
    "energy_change": "energy_change",
    "coherence": "coherence",
    "overdamped": "overdamped_ratio",
}


def perplexity(loss: float | None) -> float | None:
    """exp(loss) of a loss in nats a token; None without a loss, infinity where it exceeds a float64."""
    if loss is None or math.isnan(loss):
        return loss
    return math.exp(loss) if loss < 709.0 else math.inf


def batch_tags(record: Record) -> dict[str, float]:
    """Tag to value of one step: ``batch/*`` and the curves of each layer, ``gamma/layer_i`` and so on.

    Figures that are not available or not finite are left out.
    """
    tags = {tag: record.get(key) for tag, key in _BATCH_TAGS.items()}
    per_layer = record.get("per_layer") or {}
    for tag, key in _LAYER_TAGS.items():
        for layer, value in enumerate(per_layer.get(key) or ()):
            tags[f"{tag}/layer_{layer}"] = value
    return _finite(tags)


def epoch_tags(record: Record) -> dict[str, float]:
    """Tag to value of one epoch: ``epoch``, ``learning_rate``, ``train/*`` and ``val/*``, with perplexities."""
    tags = {tag: record.get(key) for tag, key in _EPOCH_TAGS.items()}
    tags["train/perplexity"] = perplexity(record.get("train_loss"))
    tags["val/perplexity"] = perplexity(record.get("val_loss"))
    return _finite(tags)


def _finite(tags: dict[str, Any]) -> dict[str, float]:
    return {tag: value for tag, value in tags.items() if value is not None and math.isfinite(value)}

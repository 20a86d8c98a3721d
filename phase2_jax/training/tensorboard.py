"""TensorBoard event files: curves, Γ histograms and heat maps on one step axis, and a dashboard that opens on Γ."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from phase2_jax.training import json_files
from phase2_jax.training.heatmap_image import gamma_heatmap_image
from phase2_jax.training.logger_base import Logger
from phase2_jax.training.records import Record, batch_tags, epoch_tags


class TensorBoardLogger(Logger):
    """Writes event files whose every point is at its global step.

    Args:
        logdir: folder of the event files.
        every: steps between two points of the batch curves; step 1 has one, too.
    """

    def __init__(self, logdir: Path, every: int = 5) -> None:
        self._logdir = logdir
        self._every = every
        self._writer: SummaryWriter | None = None

    def on_start(self, run_info: dict[str, Any]) -> None:
        start_step = run_info.get("start_step", 0)
        # A killed session may have logged steps that its checkpoint does not hold: readers drop what purge_step names.
        # Files are read in the order of their names, and two sessions within a second differ in the suffix only.
        writer = SummaryWriter(
            logdir=str(self._logdir),
            purge_step=start_step + 1 if start_step else None,
            filename_suffix=f".{start_step:010d}.{os.getpid()}",
            flush_secs=20,
        )
        writer.add_custom_scalars(_layout())
        writer.add_text("hyperparameters", _as_table(run_info.get("hyperparameters", {})), start_step)
        writer.flush()
        self._writer = writer

    def on_step(self, record: Record, batch_index: int, num_batches: int) -> None:
        step = record["step"]
        if self._writer is None or (step % self._every and step != 1):
            return
        for tag, value in batch_tags(record).items():
            self._writer.add_scalar(tag, value, step)

    def on_epoch(self, record: Record, improved: bool) -> None:
        if self._writer is None:
            return
        step = record["step"]
        for tag, value in epoch_tags(record).items():
            self._writer.add_scalar(tag, value, step)
        if record.get("gamma_histogram"):
            _add_histograms(self._writer, record["gamma_histogram"], step)
        if record.get("gamma_heatmap"):
            gamma_LxN = np.array(record["gamma_heatmap"], dtype=np.float64)
            self._writer.add_image("gamma_heatmap", gamma_heatmap_image(gamma_LxN), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _add_histograms(writer: SummaryWriter, histogram: dict[str, Any], step: int) -> None:
    edges = np.asarray(histogram["edges"], dtype=np.float64)
    middles = 0.5 * (edges[1:] + edges[:-1])
    for layer, layer_counts in enumerate(histogram["counts"]):
        counts = np.asarray(layer_counts, dtype=np.float64)
        filled = np.flatnonzero(counts)
        if filled.size == 0:
            continue
        used = slice(filled[0], filled[-1] + 1)
        writer.add_histogram_raw(
            f"gamma_histogram/layer_{layer}",
            min=float(edges[used.start]),
            max=float(edges[used.stop]),
            num=int(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:][used].tolist(),
            bucket_counts=counts[used].tolist(),
            global_step=step,
        )


def _layout() -> dict[str, dict[str, list[Any]]]:
    """Charts of the custom-scalars page; tags of multi-line charts are regular expressions matched from the start."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [f"{tag}$" for tag in tags]]

    def per_layer(name: str) -> list[Any]:
        return lines(rf"{name}/layer_\d+")

    return {
        "Γ (forgetting rate)": {
            "Γ per layer": per_layer("gamma"),
            "Γ mean, min, max": ["Margin", ["batch/gamma_mean", "batch/gamma_min", "batch/gamma_max"]],
        },
        "Loss and perplexity": {
            "loss (nats per token)": lines("batch/loss", "train/loss", "val/loss"),
            "perplexity": lines("train/perplexity", "val/perplexity"),
            "learning rate": lines("batch/learning_rate"),
        },
        "Memory": {
            "SNR per layer": per_layer("snr"),
            "resonant modes per layer": per_layer("resonance"),
            "Lyapunov-stable share per layer": per_layer("stability"),
            "fast-weight energy": lines("batch/fast_weight_energy"),
        },
    }


def _as_table(hyperparameters: dict[str, Any]) -> str:
    rows = [f"| {name} | {value} |" for name, value in _flattened(json_files.to_plain(hyperparameters), "")]
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _flattened(tree: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            pairs += _flattened(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, json.dumps(value, ensure_ascii=False).replace("|", "\\|")))
    return pairs

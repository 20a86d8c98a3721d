"""TensorBoard event files: curves, Γ histograms and heat maps on one step axis, and a dashboard that opens on Γ.

tensorboardX's SummaryWriter hands its events to a thread, and its flush does not wait for it: what a killed run had
logged before its last checkpoint could be missing from the curves for good. Its parts, used here, write the same files
at once, without a thread, and take a whole step's curves as one event.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from phase2_jax.training import json_files
from phase2_jax.training.event_files import truncate_after
from phase2_jax.training.heatmap_image import gamma_heatmap_image
from phase2_jax.training.logger_base import Logger
from phase2_jax.training.records import Record, batch_tags, epoch_tags
from phase2_jax.training.workdir import flatten

_SECONDS_BETWEEN_FLUSHES = 10.0
_RESULTS = ("val/loss", "val/perplexity", "train/loss", "train/gamma_mean")


class TensorBoardLogger(Logger):
    """Writes event files whose every point is at its global step.

    Args:
        logdir: folder of the event files, made if missing.
        every: steps between two points of the batch curves; step 1 has one, too.
    """

    def __init__(self, logdir: Path, every: int = 5) -> None:
        self._logdir = logdir
        self._every = every
        self._events: EventsWriter | None = None
        self._flushed = 0.0

    def on_start(self, run_info: dict[str, Any]) -> None:
        start_step = run_info.get("start_step", 0)
        self._logdir.mkdir(parents=True, exist_ok=True)
        # A killed session may have logged steps that its checkpoint does not hold.
        truncate_after(self._logdir, start_step)
        # Files are read in the order of their names, and sessions within one second differ in the suffix only.
        suffix = f".{start_step:010d}.{os.getpid()}"
        self._events = EventsWriter(str(self._logdir / "events"), filename_suffix=suffix)
        # A server that is already running has read the old files: where a later session starts, it drops what lies at
        # its step or beyond. It takes the first start it meets for the run's own, so the first session has one, too.
        start = Event(wall_time=time.time(), step=start_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._events.write_event(start)
        self._write(summary.custom_scalars(_layout()), start_step)
        hyperparameters = flatten(json_files.to_plain(run_info.get("hyperparameters", {})))
        self._write(summary.text("hyperparameters", _as_table(hyperparameters)), start_step)
        # TensorBoard shows a run's hyper-parameters beside these results, and compares runs by them.
        for values in summary.hparams(hyperparameters, dict.fromkeys(_RESULTS))[:2]:
            self._write(values, start_step)
        self._flush()

    def on_step(self, record: Record, batch_index: int, num_batches: int) -> None:
        step = record["step"]
        if step % self._every and step != 1:
            return
        self._write(_scalars(batch_tags(record)), step)
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self._flush()

    def on_epoch(self, record: Record, improved: bool) -> None:
        step = record["step"]
        self._write(_scalars(epoch_tags(record)), step)
        if record.get("gamma_histogram"):
            for histogram in _histograms(record["gamma_histogram"]):
                self._write(histogram, step)
        if record.get("gamma_heatmap"):
            pixels = gamma_heatmap_image(np.array(record["gamma_heatmap"], dtype=np.float64))
            self._write(summary.image("gamma_heatmap", pixels, dataformats="HWC"), step)
        if record.get("sample_text"):
            self._write(summary.text("sample_text", _as_quotation(*record["sample_text"])), step)
        self._flush()

    def on_checkpoint(self, step: int, epoch: int | None = None) -> None:
        self._flush()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def _flush(self) -> None:
        if self._events is not None:
            self._events.flush()
            self._flushed = time.monotonic()

    def _write(self, values: Summary, step: int) -> None:
        if self._events is not None:
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=values))


def _scalars(tags: dict[str, float]) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in tags.items()])


def _histograms(histogram: dict[str, Any]) -> Iterator[Summary]:
    """One histogram a layer, from the first filled bin to the last; sums are those of the bins' middles."""
    edges = np.asarray(histogram["edges"], dtype=np.float64)
    middles = 0.5 * (edges[1:] + edges[:-1])
    for layer, layer_counts in enumerate(histogram["counts"]):
        counts = np.asarray(layer_counts, dtype=np.float64)
        filled = np.flatnonzero(counts)
        if filled.size == 0:
            continue
        used = slice(filled[0], filled[-1] + 1)
        yield summary.histogram_raw(
            f"gamma_histogram/layer_{layer}",
            min=float(edges[used.start]),
            max=float(edges[used.stop]),
            num=int(counts.sum()),
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:][used].tolist(),
            bucket_counts=counts[used].tolist(),
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
            "fast-weight energy per layer": per_layer("energy"),
            "coherence per layer": per_layer("coherence"),
        },
    }


def _as_table(hyperparameters: dict[str, Any]) -> str:
    written = ((name, json.dumps(value, ensure_ascii=False)) for name, value in hyperparameters.items())
    rows = ("| {} | {} |".format(name, value.replace("|", "\\|")) for name, value in written)
    return "\n".join(["| name | value |", "|---|---|", *rows])


def _as_quotation(prompt: str, continuation: str) -> str:
    """Markdown that shows both texts as they are."""
    verbatim = lambda text: "\n".join(f"    {line}" for line in text.splitlines())  # noqa: E731
    return f"Prompt (validation text):\n\n{verbatim(prompt)}\n\nThe model continues:\n\n{verbatim(continuation)}"

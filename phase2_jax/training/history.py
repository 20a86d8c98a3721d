"""What a run remembers of its training: finished epochs, running means of the current one, the metrics file."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

from phase2_jax.errors import UserError
from phase2_jax.training import json_files
from phase2_jax.training.records import DIAGNOSTIC_KEYS, PER_LAYER_KEYS, PICTURE_KEYS, Record, perplexity

HISTORY_FILE = "training_history.json"
METRICS_FILE = "metrics.jsonl"
HEATMAP_COLUMNS = 256
_PICTURE_DIGITS = 4
_LAYER_DIGITS = 7


@dataclass
class TrainingHistory:
    """Figures of every finished epoch, one entry an epoch in each list.

    Losses are in nats a token, ``epoch_times`` in seconds, ``peak_vram_mb`` in MiB. ``gamma_histograms`` hold counts a
    layer; ``gamma_heatmaps`` the forgetting rate of one validation sequence as {"tokens_per_column", "values":
    [L][columns]}, averaged to at most ``HEATMAP_COLUMNS`` columns and rounded, so that the file stays small. Figures
    that were not available, or not finite, are None.
    """

    train_losses: list[float | None] = field(default_factory=list)
    val_losses: list[float | None] = field(default_factory=list)
    learning_rates: list[float | None] = field(default_factory=list)
    gamma_history: list[dict[str, Any]] = field(default_factory=list)
    snr_history: list[dict[str, Any]] = field(default_factory=list)
    resonance_history: list[dict[str, Any]] = field(default_factory=list)
    stability_history: list[dict[str, Any]] = field(default_factory=list)
    best_val_loss: float | None = None
    total_epochs: int = 0
    steps: list[int] = field(default_factory=list)
    train_perplexities: list[float | None] = field(default_factory=list)
    val_perplexities: list[float | None] = field(default_factory=list)
    val_accuracies: list[float | None] = field(default_factory=list)
    epoch_times: list[float | None] = field(default_factory=list)
    tokens_per_second: list[float | None] = field(default_factory=list)
    peak_vram_mb: list[float | None] = field(default_factory=list)
    gamma_histograms: list[dict[str, Any] | None] = field(default_factory=list)
    gamma_heatmaps: list[dict[str, Any] | None] = field(default_factory=list)

    def append(self, record: Record) -> bool:
        """Add one epoch record; returns whether its validation loss is the best so far."""
        plain = json_files.to_plain(_without_pictures(record))
        per_layer = plain.get("per_layer") or {}

        def figures(layer_key: str, **keys: str) -> dict[str, Any]:
            return {name: plain.get(key) for name, key in keys.items()} | {"per_layer": per_layer.get(layer_key)}

        self.train_losses.append(plain.get("train_loss"))
        self.val_losses.append(plain.get("val_loss"))
        self.learning_rates.append(plain.get("learning_rate"))
        self.gamma_history.append(
            figures("gamma_mean", mean="mean_gamma", std="std_gamma", min="min_gamma", max="max_gamma")
        )
        self.snr_history.append(figures("snr_mean", mean="mean_snr", low_ratio="low_snr_ratio"))
        self.resonance_history.append(
            figures("resonant_modes", modes="num_resonant_modes", energy="total_resonance_energy")
        )
        self.stability_history.append(
            figures("stable_ratio", stable_ratio="lyapunov_stable_ratio", energy="mean_fast_weight_energy")
        )
        self.steps.append(plain["step"])
        self.train_perplexities.append(json_files.to_plain(perplexity(plain.get("train_loss"))))
        self.val_perplexities.append(json_files.to_plain(perplexity(plain.get("val_loss"))))
        self.val_accuracies.append(plain.get("val_accuracy"))
        self.epoch_times.append(plain.get("epoch_time"))
        self.tokens_per_second.append(plain.get("tokens_per_second"))
        self.peak_vram_mb.append(plain.get("peak_vram_mb"))
        self.gamma_histograms.append(_rounded(record.get("gamma_histogram")))
        self.gamma_heatmaps.append(_shrunk_heatmap(record.get("gamma_heatmap")))
        self.total_epochs = len(self.train_losses)
        val_loss = plain.get("val_loss")
        improved = val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss)
        if improved:
            self.best_val_loss = val_loss
        return improved

    def to_json(self) -> dict[str, Any]:
        """Plain data for strict JSON; ``from_json`` gives an equal history back."""
        return {item.name: json_files.to_plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The history that ``to_json`` described; names of newer versions are ignored."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in json_files.to_plain(data).items() if name in known})

    def write(self, workdir: Path) -> Path:
        """Rewrite ``workdir/training_history.json`` atomically and return its path."""
        path = workdir / HISTORY_FILE
        json_files.write_atomically(path, [json_files.dumps(self.to_json()), "\n"])
        return path

    @classmethod
    def read(cls, workdir: Path) -> Self:
        """Read ``workdir/training_history.json``.

        Raises:
            UserError: the file is missing or is not a history.
        """
        path = workdir / HISTORY_FILE
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: give a work directory in which at least one epoch ended") from None
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is not a training history ({error}): delete it, train.py writes it again"
            ) from error


_MEAN_KEYS = ("loss", "grad_norm", "tokens_per_second", "mfu", "current_vram_mb", *DIAGNOSTIC_KEYS)


@dataclass
class EpochAccumulator:
    """Means of an epoch's step records, kept as sums so that they can travel in a checkpoint.

    A figure that was never available stays None; one that was not finite at any step has the mean NaN. ``peak_vram_mb``
    is a maximum, ``learning_rate`` the last step's. Saving and restoring in between changes no bit of the result.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    num_layers: int = 0
    num_steps: int = 0
    step: int = 0
    learning_rate: float | None = None
    peak_vram_mb: float | None = None
    seconds: float = 0.0

    def add(self, record: Record, seconds: float = 0.0) -> None:
        """Count one step record, and ``seconds`` of wall-clock time towards the epoch's ``epoch_time``."""
        for key in _MEAN_KEYS:
            self._add_value(key, record.get(key))
        per_layer = record.get("per_layer") or {}
        for key in PER_LAYER_KEYS:
            values = per_layer.get(key) or ()
            self.num_layers = max(self.num_layers, len(values))
            for layer, value in enumerate(values):
                self._add_value(f"{key}/{layer}", value)
        peak = record.get("peak_vram_mb")
        if peak is not None:
            self.peak_vram_mb = float(peak if self.peak_vram_mb is None else max(self.peak_vram_mb, peak))
        self.learning_rate = record.get("learning_rate")
        self.step = record["step"]
        self.num_steps += 1
        self.seconds += seconds

    def _add_value(self, key: str, value: float | None) -> None:
        if value is None:
            return
        # Any non-finite value spoils the sum as NaN: strict JSON could not tell the infinities apart again.
        finite = float(value) if math.isfinite(value) else math.nan
        self.sums[key] = self.sums.get(key, 0.0) + finite
        self.counts[key] = self.counts.get(key, 0) + 1

    def _mean(self, key: str) -> float | None:
        return self.sums[key] / self.counts[key] if key in self.sums else None

    def result(
        self,
        *,
        epoch: int,
        val_loss: float | None,
        val_accuracy: float | None = None,
        gamma_histogram: dict[str, Any] | None = None,
        gamma_heatmap: list[list[float]] | None = None,
    ) -> Record:
        """The epoch record of the steps added so far; ``epoch`` counts from 1, ``val_loss`` is in nats a token."""
        record: Record = {
            "epoch": epoch,
            "step": self.step,
            "train_loss": self._mean("loss"),
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "learning_rate": self.learning_rate,
            "epoch_time": self.seconds,
            "peak_vram_mb": self.peak_vram_mb,
        }
        record |= {key: self._mean(key) for key in _MEAN_KEYS if key != "loss"}
        record["per_layer"] = {
            key: [self._mean(f"{key}/{layer}") for layer in range(self.num_layers)] for key in PER_LAYER_KEYS
        }
        return record | {"gamma_histogram": gamma_histogram, "gamma_heatmap": gamma_heatmap}

    def to_json(self) -> dict[str, Any]:
        """Plain data for strict JSON (NaN sums become null); ``from_json`` continues where it stopped."""
        return json_files.to_plain(asdict(self))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The accumulator that ``to_json`` described."""
        sums = {key: math.nan if value is None else value for key, value in data["sums"].items()}
        return cls(**{**data, "sums": sums, "counts": dict(data["counts"])})


class MetricsFile:
    """``metrics.jsonl``: one line a step and one an epoch, only ever appended to, each flushed as it is written.

    A line is a record with ``"kind": "step"`` or ``"kind": "epoch"``; histograms and heat maps are in the history only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def write_step(self, record: Record) -> None:
        """Append one step record."""
        self._write({"kind": "step"} | record)

    def write_epoch(self, record: Record) -> None:
        """Append one epoch record without its pictures."""
        self._write({"kind": "epoch"} | _without_pictures(record))

    def _write(self, record: Record) -> None:
        if record.get("per_layer"):
            # These figures are float32: written out as float64 they would double the file and say no more.
            record = record | {"per_layer": json_files.round_significant(record["per_layer"], _LAYER_DIGITS)}
        if self._file is None:
            self._file = self.path.open("a", encoding="utf-8")
        self._file.write(json_files.dumps(record) + "\n")
        self._file.flush()

    def truncate_after(self, step: int, epochs: int | None = None) -> None:
        """Forget what came after ``step``, and an unfinished last line, so that a resumed run leaves no line twice.

        Args:
            step: the last step to keep (the one the checkpoint holds); 0 empties the file.
            epochs: how many epochs the checkpoint counts as finished. It decides about an epoch line at ``step``
                itself, which a run killed between that line and its checkpoint would write again. None keeps it.

        Raises:
            UserError: a line before the last is not a record.
        """
        self.close()
        if not self.path.exists():
            return

        def kept() -> Iterator[str]:
            for line, record in _lines(self.path):
                late_epoch = record["kind"] == "epoch" and epochs is not None and record["epoch"] > epochs
                if record["step"] <= step and not late_epoch:
                    yield line

        json_files.write_atomically(self.path, kept())

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics file in order, without a last line that a killed run left unfinished.

    Raises:
        UserError: a line before the last is not a record.
    """
    return (record for _, record in _lines(path))


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
                missing = {"kind", "step"} - record.keys()
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path} line {number} is not a JSON record ({error}): delete that line") from error
            if missing:
                raise UserError(f"{path} line {number} lacks {sorted(missing)}: delete that line")
            yield line, record


def _without_pictures(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in PICTURE_KEYS}


def _rounded(histogram: dict[str, Any] | None) -> dict[str, Any] | None:
    return json_files.to_plain(json_files.round_significant(histogram, _PICTURE_DIGITS + 2))


def _shrunk_heatmap(heatmap_LxN: list[list[float]] | None) -> dict[str, Any] | None:
    if heatmap_LxN is None:
        return None
    values_LxN = np.asarray(heatmap_LxN, dtype=np.float64)
    num_tokens = values_LxN.shape[1]
    width = -(-num_tokens // HEATMAP_COLUMNS)
    starts = np.arange(0, num_tokens, width)
    sums_LxM = np.add.reduceat(values_LxN, starts, axis=1)
    means_LxM = sums_LxM / np.diff(np.append(starts, num_tokens))
    return {
        "tokens_per_column": width,
        "values": json_files.to_plain(json_files.round_significant(means_LxM, _PICTURE_DIGITS)),
    }

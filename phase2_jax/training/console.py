"""Progress on screen, in plain lines that also read well in a pipe or a log file."""

import sys
import time
from typing import Any, TextIO

from phase2_jax.training.logger_base import Logger
from phase2_jax.training.records import Record, perplexity

RULE = "=" * 80
_ASCII = str.maketrans({"Γ": "Gamma", "✓": "[ok]", "±": "+/-", "–": "-", "→": "->"})


class ConsoleLogger(Logger):
    """Header, a line every few batches, a summary of each epoch.

    Args:
        every: batches of an epoch between two lines; the epoch's last batch always has one.
        stream: where to print; None is standard output.
    """

    def __init__(self, every: int = 10, stream: TextIO | None = None) -> None:
        self._every = every
        self._stream = stream
        self._num_epochs: int | None = None
        self._total_steps: int | None = None
        self._epoch: int | None = None
        self._clock: tuple[int, float] | None = None

    def on_start(self, run_info: dict[str, Any]) -> None:
        self._num_epochs = run_info.get("num_epochs")
        self._total_steps = run_info.get("total_steps")
        self._print(f"\n{RULE}\nPhase 2 'Breath of Life' Model Training\n{RULE}\n\nConfiguration:")
        for label, value in run_info.get("configuration", {}).items():
            thousands = isinstance(value, int) and not isinstance(value, bool)
            self._print(f"  {label}: {value:,}" if thousands else f"  {label}: {value}")
        self._print_parameters(run_info.get("parameters", []))
        if run_info.get("start_step"):
            self._print(f"\nResumed from step {run_info['start_step']}")

    def _print_parameters(self, rows: list[tuple[str, tuple[int, ...], int]]) -> None:
        if not rows:
            return
        width = max(len(name) for name, _, _ in rows)
        self._print("\nParameters (arrays of all layers are stacked):")
        for name, shape, count in rows:
            self._print(f"  {name:<{width}}  {' x '.join(map(str, shape)) or 'scalar':<16} {count:>13,}")
        self._print(f"  {'total':<{width}}  {'':<16} {sum(count for _, _, count in rows):>13,}")

    def on_step(self, record: Record, batch_index: int, num_batches: int) -> None:
        self._begin_epoch(record)
        number = batch_index + 1
        if number % self._every and number != num_batches:
            return
        figures = [
            f"loss={_number(record.get('loss'), '.4f')}",
            f"lr={_number(record.get('learning_rate'), '.2e')}",
            f"vram={_number(record.get('peak_vram_mb'), '.1f', 'MB')}",
            f"Γ={_number(record.get('mean_gamma'), '.4f')}",
            f"SNR={_number(record.get('mean_snr'), '.2f')}",
            f"{_number(record.get('tokens_per_second'), ',.0f')} tokens/s",
        ]
        if record.get("mfu") is not None:
            figures.append(f"MFU {record['mfu']:.1%}")
        left = None
        if self._total_steps is not None:
            left = self._seconds_left(record["step"], self._total_steps - record["step"])
        if left is not None:
            figures.append(f"{duration(left)} left")
        self._print(f"  Batch {number}/{num_batches}: {', '.join(figures)}")

    def _begin_epoch(self, record: Record) -> None:
        """Print an epoch's heading before its first step."""
        if self._clock is None:
            # The first step holds the compilation: the clock for the time left starts behind it.
            self._clock = (record["step"], time.monotonic())
        if record["epoch"] == self._epoch:
            return
        self._epoch = record["epoch"]
        self._print(f"\n{RULE}\nEpoch {self._of_epochs(record)}\n{RULE}")

    def on_epoch(self, record: Record, improved: bool) -> None:
        percent = {
            key: None if record.get(key) is None else 100.0 * record[key]
            for key in ("low_snr_ratio", "lyapunov_stable_ratio")
        }
        accuracy = record.get("val_accuracy")
        right = "" if accuracy is None else f", accuracy: {100.0 * accuracy:.2f}%"
        train, val = record.get("train_loss"), record.get("val_loss")
        self._print(
            f"\n{RULE}\nEpoch {self._of_epochs(record)} Summary\n{RULE}\n"
            f"Train Loss: {_number(train, '.4f')} (PPL: {_number(perplexity(train), '.2f')})\n"
            f"Val Loss:   {_number(val, '.4f')} (PPL: {_number(perplexity(val), '.2f')}{right})\n"
            f"Time:       {_number(record.get('epoch_time'), '.1f', 's')}\n"
            f"Peak VRAM:  {_number(record.get('peak_vram_mb'), '.1f', 'MB')}\n"
            "\nΓ (Forgetting Rate) Statistics:\n"
            f"  Mean: {_number(record.get('mean_gamma'), '.4f')}\n"
            f"  Std:  {_number(record.get('std_gamma'), '.4f')}\n"
            f"  Min:  {_number(record.get('min_gamma'), '.4f')}\n"
            f"  Max:  {_number(record.get('max_gamma'), '.4f')}\n"
            "\nSNR (Signal-to-Noise Ratio) Statistics:\n"
            f"  Mean SNR:       {_number(record.get('mean_snr'), '.2f')}\n"
            f"  Low SNR Ratio:  {_number(percent['low_snr_ratio'], '.1f', '%')}\n"
            "\nMemory Resonance:\n"
            f"  Resonant Modes: {_number(record.get('num_resonant_modes'), '.1f')}\n"
            f"  Total Energy:   {_number(record.get('total_resonance_energy'), '.4f')}\n"
            "\nLyapunov Stability:\n"
            f"  Stable Ratio:   {_number(percent['lyapunov_stable_ratio'], '.1f', '%')}\n"
            f"  Mean Energy:    {_number(record.get('mean_fast_weight_energy'), '.4f')}\n"
            f"{RULE}\n"
        )
        if improved:
            self._print(f"  ✓ New best model saved! (val_loss: {_number(val, '.4f')})")

    def on_checkpoint(self, step: int, epoch: int | None = None) -> None:
        self._print(f"  ✓ Checkpoint saved ({f'step {step}' if epoch is None else f'epoch {epoch}'})")

    def on_message(self, text: str) -> None:
        self._print(text)

    def on_finish(self, best_val_loss: float | None) -> None:
        self._print(f"\n{RULE}\nTraining completed!")
        self._print(f"Best validation loss: {_number(best_val_loss, '.4f')}\n{RULE}\n")

    def _of_epochs(self, record: Record) -> str:
        return f"{record['epoch']}" if self._num_epochs is None else f"{record['epoch']}/{self._num_epochs}"

    def _seconds_left(self, step: int, steps_to_come: int) -> float | None:
        """Time of the steps to come, validation included, at the pace since the first step of this process."""
        if self._clock is None or step <= self._clock[0]:
            return None
        first_step, started = self._clock
        return (time.monotonic() - started) / (step - first_step) * max(steps_to_come, 0)

    def _print(self, text: str) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        print(printable(text, getattr(stream, "encoding", None)), file=stream, flush=True)


def printable(text: str, encoding: str | None) -> str:
    """``text`` with what ``encoding`` cannot hold spelt out in ASCII, so that no locale stops a run."""
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, errors="replace").decode(encoding)
    return text


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:{form}}{unit}"


def duration(seconds: float) -> str:
    """Seconds in words that read at a glance: 2h 05m, 3m 12s, 7s."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"

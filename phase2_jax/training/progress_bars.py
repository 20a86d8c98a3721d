"""Progress on a terminal: bars with rates and time left under the lines that stay."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from phase2_jax.training.console import ConsoleLogger, duration
from phase2_jax.training.records import Record

# Drawing costs time that a step on a small machine needs more.
_REFRESHES_PER_SECOND = 2


class ProgressBarLogger(ConsoleLogger):
    """As `ConsoleLogger`, with a bar for the epoch, one for the run and one for a validation instead of batch lines.

    Args:
        console: of rich; None is standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console()
        self._bars = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            transient=True,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        # Batches done when the first word of a validation came, and the time then.
        self._validation: tuple[int, float] | None = None

    def on_start(self, run_info: dict[str, Any]) -> None:
        super().on_start(run_info)
        self._bars.start()
        if self._total_steps is not None:
            self._show("run", "Run", run_info.get("start_step", 0), self._total_steps, figures="compiling")

    def on_step(self, record: Record, batch_index: int, num_batches: int) -> None:
        self._begin_epoch(record)
        speed, loss, gamma = (record.get(key) for key in ("tokens_per_second", "loss", "mean_gamma"))
        rate = "" if speed is None else f"{speed:,.0f} tokens/s"
        figures = "" if loss is None or gamma is None else f"loss {loss:.4f}  Γ {gamma:.4f}"
        done = batch_index + 1
        left = self._seconds_left(record["step"], num_batches - done)
        self._show("epoch", f"Epoch {self._of_epochs(record)}", done, num_batches, rate, left, figures)
        if self._total_steps is not None:
            to_come = self._total_steps - record["step"]
            left = self._seconds_left(record["step"], to_come)
            rate = f"{to_come / left:,.1f} steps/s" if left else ""
            self._show("run", "Run", record["step"], self._total_steps, rate, left)

    def on_validation(self, done: int, total: int) -> None:
        first, started = self._validation = self._validation or (done, time.monotonic())
        pace = (done - first) / max(time.monotonic() - started, 1e-9)
        rate, left = (f"{pace:,.1f} batches/s", (total - done) / pace) if pace else ("", None)
        self._show("validation", "Validation", done, total, rate, left)

    def on_epoch(self, record: Record, improved: bool) -> None:
        self._remove("epoch")
        self._remove("validation")
        self._validation = None
        super().on_epoch(record, improved)

    def on_finish(self, best_val_loss: float | None) -> None:
        self._bars.stop()
        super().on_finish(best_val_loss)

    def close(self) -> None:
        self._bars.stop()

    def _show(
        self,
        name: str,
        description: str,
        done: int,
        total: int,
        rate: str = "",
        left: float | None = None,
        figures: str = "",
    ) -> None:
        shown: dict[str, Any] = {
            "rate": rate,
            "left": "" if left is None else f"{duration(left)} left",
            "figures": figures,
        }
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(description, total=total, **shown)
        self._bars.update(self._tasks[name], completed=done, total=total, **shown)

    def _remove(self, name: str) -> None:
        if name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

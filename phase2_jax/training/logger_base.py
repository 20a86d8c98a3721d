"""The interface between the training loop and everything that shows its progress."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from phase2_jax.training.records import Record


class Logger:
    """Told of everything that happens in a run; each method does nothing unless a logger overrides it."""

    def on_start(self, run_info: dict[str, Any]) -> None:
        """The run begins or resumes.

        Args:
            run_info: all optional. ``configuration`` (label to value, the list on screen), ``parameters`` (name,
                shape and size of each array), ``hyperparameters`` (the whole configuration, nested), ``start_step``
                (steps already done, 0 for a fresh run), ``total_steps``, ``num_epochs``.
        """

    def on_step(self, record: Record, batch_index: int, num_batches: int) -> None:
        """A step record arrived; ``batch_index`` counts from 0 to ``num_batches`` - 1 within the epoch."""

    def on_validation(self, done: int, total: int) -> None:
        """So many of the validation batches are under way."""

    def on_epoch(self, record: Record, improved: bool) -> None:
        """An epoch ended; ``improved``: its validation loss is the best so far."""

    def on_checkpoint(self, step: int, epoch: int | None = None) -> None:
        """A checkpoint was saved at ``step``, and at the end of ``epoch`` (from 1) unless that is None.

        A run killed from now on resumes there, so what was logged up to here has to be on disk.
        """

    def on_message(self, text: str) -> None:
        """Something a person watching should read, one line."""

    def on_finish(self, best_val_loss: float | None) -> None:
        """Training reached its end."""

    def close(self) -> None:
        """Flush and release everything; called also when the run fails."""


class LoggerGroup(Logger):
    """Passes everything on to each of its loggers, in order."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)

    def on_start(self, run_info: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.on_start(run_info)

    def on_step(self, record: Record, batch_index: int, num_batches: int) -> None:
        for logger in self.loggers:
            logger.on_step(record, batch_index, num_batches)

    def on_validation(self, done: int, total: int) -> None:
        for logger in self.loggers:
            logger.on_validation(done, total)

    def on_epoch(self, record: Record, improved: bool) -> None:
        for logger in self.loggers:
            logger.on_epoch(record, improved)

    def on_checkpoint(self, step: int, epoch: int | None = None) -> None:
        for logger in self.loggers:
            logger.on_checkpoint(step, epoch)

    def on_message(self, text: str) -> None:
        for logger in self.loggers:
            logger.on_message(text)

    def on_finish(self, best_val_loss: float | None) -> None:
        for logger in self.loggers:
            logger.on_finish(best_val_loss)

    def close(self) -> None:
        with ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)

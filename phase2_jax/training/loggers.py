"""Chooses the loggers of a run."""

import os
import sys
from pathlib import Path

from phase2_jax.training.console import ConsoleLogger
from phase2_jax.training.logger_base import Logger, LoggerGroup
from phase2_jax.training.logging_config import LoggingConfig


def build_loggers(config: LoggingConfig, workdir: Path, *, primary: bool = True) -> Logger:
    """The loggers that ``config`` asks for, as one.

    Args:
        config: what to log and how often.
        workdir: TensorBoard files go to ``workdir/tensorboard``, the W&B run's identity to ``workdir/wandb_run_id``.
        primary: False in all but one process of a run on several hosts: those log nothing.
    """
    if not primary:
        return LoggerGroup([])
    loggers: list[Logger] = [_console(config)]
    # Imported where they are needed: who switched them off does not pay for their start.
    if config.tensorboard:
        from phase2_jax.training.tensorboard import TensorBoardLogger

        loggers.append(TensorBoardLogger(workdir / "tensorboard", every=config.batch_every))
    if config.wandb.enabled:
        from phase2_jax.training.wandb_logger import WandbLogger

        loggers.append(WandbLogger(config.wandb, workdir, every=config.batch_every))
    return LoggerGroup(loggers)


def _console(config: LoggingConfig) -> Logger:
    """Bars where somebody watches a terminal that can draw them, plain lines in pipes and log files."""
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from phase2_jax.training.progress_bars import ProgressBarLogger

        return ProgressBarLogger()
    return ConsoleLogger(every=config.console_every)

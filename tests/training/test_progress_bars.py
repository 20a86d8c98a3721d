"""Bars on a terminal: what stays on screen, what they show, and that pipes get plain lines."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from phase2_jax.training.console import ConsoleLogger
from phase2_jax.training.logger_base import Logger, LoggerGroup
from phase2_jax.training.loggers import build_loggers
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.progress_bars import ProgressBarLogger
from phase2_jax.training.records import Record

MakeRecord = Callable[[int], Record]
LogSteps = Callable[[Logger, int, int], None]


def screen(logger: ProgressBarLogger) -> str:
    """The bars as they stand."""
    console = Console(file=io.StringIO(), width=140)
    console.print(logger._bars.get_renderable())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bars_show_epoch_run_and_validation(monkeypatch: pytest.MonkeyPatch, step_record: MakeRecord) -> None:
    seconds = iter(range(0, 1000, 2))
    monkeypatch.setattr("phase2_jax.training.console.time.monotonic", lambda: float(next(seconds)))
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    logger = ProgressBarLogger(console)
    logger.on_start({"configuration": {"Device": "[cpu]"}, "num_epochs": 2, "total_steps": 20})
    assert re.search(r"Run +.* 0/20 .*compiling", screen(logger))
    logger.on_step(step_record(1), 0, 10)
    logger.on_step(step_record(3), 2, 10)
    run, epoch = screen(logger).splitlines()
    # Two steps since the first took 2 seconds when the epoch's time was read, 4 when the run's was.
    assert re.search(r"Epoch 1/2 +.* 3/10 12,346 tokens/s 7s left +loss 3.3333 +Γ 0.0625", epoch)
    assert re.search(r"Run +.* 3/20 0.5 steps/s .*34s left", run)
    assert "compiling" not in run
    logger.on_validation(1, 4)
    logger.on_validation(2, 4)
    # One batch in two looks at a clock that goes on by 2 seconds each; two are to come.
    assert re.search(r"Validation +.* 2/4 +0.2 batches/s +8s left", screen(logger).splitlines()[2])
    logger.on_epoch({"epoch": 1, "step": 10, "val_loss": 3.25}, improved=True)
    assert "Epoch" not in screen(logger)
    logger.on_step(step_record(11), 0, 10)
    run, epoch = screen(logger).splitlines()
    assert "Epoch 2/2" in epoch
    assert " 1/10 " in epoch
    assert "11/20" in run
    logger.on_finish(3.25)
    logger.close()
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    for line in ("  Device: [cpu]", "Epoch 1/2 Summary", "  ✓ New best model saved! (val_loss: 3.2500)"):
        assert line in printed
    assert "Batch 10/10" not in printed


@pytest.mark.parametrize(
    ("terminal", "kind", "expected"),
    [(True, "xterm", ProgressBarLogger), (True, "dumb", ConsoleLogger), (False, "xterm", ConsoleLogger)],
)
def test_terminals_get_bars_and_pipes_get_lines(
    terminal: bool, kind: str, expected: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("TERM", kind)
    loggers = build_loggers(LoggingConfig(tensorboard=False), tmp_path)
    assert isinstance(loggers, LoggerGroup)
    assert type(loggers.loggers[0]) is expected
    loggers.close()


def test_closing_twice_after_a_failure_is_harmless(log_steps: LogSteps) -> None:
    logger = ProgressBarLogger(Console(file=io.StringIO(), force_terminal=True, width=140))
    logger.on_start({})
    log_steps(logger, 1, 3)
    logger.close()
    logger.close()

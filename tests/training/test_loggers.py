"""What a person sees on screen, and how a configuration chooses the loggers."""

import io
import itertools
import math
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from phase2_jax.errors import UserError
from phase2_jax.training import console
from phase2_jax.training.console import RULE, ConsoleLogger, printable
from phase2_jax.training.logger_base import Logger, LoggerGroup
from phase2_jax.training.loggers import build_loggers
from phase2_jax.training.logging_config import LoggingConfig, WandbConfig
from phase2_jax.training.records import Record

MakeRecord = Callable[[int], Record]
LogSteps = Callable[[Logger, int, int], None]


def test_console_header_and_lines_are_the_originals(capsys: pytest.CaptureFixture[str], log_steps: LogSteps) -> None:
    logger = ConsoleLogger(every=4)
    logger.on_start({"configuration": {"Vocabulary size": 10000, "Compiled": True, "Device": "cpu"}, "num_epochs": 2})
    log_steps(logger, 1, 10)
    logger.on_checkpoint(10, epoch=1)
    logger.on_checkpoint(12)
    logger.on_finish(3.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:9] == [
        RULE,
        "Phase 2 'Breath of Life' Model Training",
        RULE,
        "",
        "Configuration:",
        "  Vocabulary size: 10,000",
        "  Compiled: True",
        "  Device: cpu",
    ]
    assert lines[10:13] == [RULE, "Epoch 1/2", RULE]
    assert lines[13:16] == [
        f"  Batch {i}/10: loss={3 + 1 / i:.4f}, lr=1.25e-04, vram=n/a, Γ=0.0625, SNR=0.31, 12,346 tokens/s"
        for i in (4, 8, 10)
    ]
    summary = lines[lines.index("Epoch 1/2 Summary") + 2 :]
    assert summary[:4] == [
        f"Train Loss: 3.5000 (PPL: {math.exp(3.5):.2f})",
        f"Val Loss:   3.2500 (PPL: {math.exp(3.25):.2f}, accuracy: 12.50%)",
        "Time:       12.5s",
        "Peak VRAM:  n/a",
    ]
    assert summary[5:10] == [
        "Γ (Forgetting Rate) Statistics:",
        "  Mean: 0.0625",
        "  Std:  0.1250",
        "  Min:  0.1875",
        "  Max:  0.2500",
    ]
    assert summary[11:14] == [
        "SNR (Signal-to-Noise Ratio) Statistics:",
        "  Mean SNR:       0.31",
        "  Low SNR Ratio:  37.5%",
    ]
    assert summary[15:18] == ["Memory Resonance:", "  Resonant Modes: 0.4", "  Total Energy:   0.5000"]
    assert summary[19:23] == ["Lyapunov Stability:", "  Stable Ratio:   56.2%", "  Mean Energy:    0.6250", RULE]
    assert summary[24:27] == [
        "  ✓ New best model saved! (val_loss: 3.2500)",
        "  ✓ Checkpoint saved (epoch 1)",
        "  ✓ Checkpoint saved (step 12)",
    ]
    assert "Best validation loss: 3.2500" in summary


def test_console_shows_memory_time_left_and_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, step_record: MakeRecord
) -> None:
    ticks = itertools.count(step=3.0)  # every look at the clock costs three seconds
    monkeypatch.setattr(console, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    out = io.StringIO()
    logger = ConsoleLogger(every=1, stream=out)
    logger.on_start({"total_steps": 2424, "start_step": 20})
    logger.on_step({"step": 21, "epoch": 3}, 0, 10)
    logger.on_step(step_record(22) | {"epoch": 3, "peak_vram_mb": 812.34}, 1, 10)
    logger.on_epoch({"epoch": 3, "step": 22}, improved=False)
    text = out.getvalue()
    assert "Resumed from step 20" in text
    assert "\nEpoch 3\n" in text
    assert "Batch 1/10: loss=n/a, lr=n/a, vram=n/a, Γ=n/a, SNR=n/a, n/a tokens/s\n" in text
    assert "vram=812.3MB" in text
    assert "2h 00m left" in text  # 2,402 steps of 3 seconds
    assert "Val Loss:   n/a (PPL: n/a)" in text
    assert "New best" not in text


def test_console_spells_out_what_the_terminal_cannot_show(log_steps: LogSteps) -> None:
    raw = io.BytesIO()
    logger = ConsoleLogger(every=1, stream=io.TextIOWrapper(raw, encoding="ascii"))
    log_steps(logger, 1, 10)
    logger.on_message("naïve")
    text = raw.getvalue().decode("ascii")
    assert "Gamma=0.0625" in text
    assert "[ok] New best model saved!" in text
    assert "na?ve" in text
    assert printable("Γ ✓", "utf-8") == "Γ ✓"


def test_configuration_chooses_the_loggers(tmp_path: Path) -> None:
    def names(config: LoggingConfig, primary: bool = True) -> list[str]:
        group = build_loggers(config, tmp_path, primary=primary)
        assert isinstance(group, LoggerGroup)
        return [type(logger).__name__ for logger in group.loggers]

    assert names(LoggingConfig()) == ["ConsoleLogger", "TensorBoardLogger"]
    assert names(LoggingConfig(tensorboard=False)) == ["ConsoleLogger"]
    assert names(LoggingConfig(wandb=WandbConfig(enabled=True)))[2:] == ["WandbLogger"]
    assert names(LoggingConfig(), primary=False) == []


def test_cadences_reach_the_loggers(tmp_path: Path, capsys: pytest.CaptureFixture[str], log_steps: LogSteps) -> None:
    logger = build_loggers(LoggingConfig(console_every=2, batch_every=4), tmp_path)
    logger.on_start({})
    log_steps(logger, 1, 10)
    logger.on_message("between")
    logger.on_checkpoint(10, 1)
    logger.on_finish(1.0)
    logger.close()
    out = capsys.readouterr().out
    assert out.count("  Batch ") == 5
    assert "between" in out
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("batch/loss")] == [1, 4, 8]


def test_every_logger_is_closed_even_if_one_fails() -> None:
    closed = []

    class Failing(Logger):
        def close(self) -> None:
            closed.append("failing")
            raise OSError("disk full")

    class Recording(Logger):
        def close(self) -> None:
            closed.append("recording")

    with pytest.raises(OSError, match="disk full"):
        LoggerGroup([Recording(), Failing(), Recording()]).close()
    assert sorted(closed) == ["failing", "recording", "recording"]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LoggingConfig(console_every=0), r"logging\.console_every is 0"),
        (LoggingConfig(batch_every=-1), r"logging\.batch_every is -1"),
        (LoggingConfig(wandb=WandbConfig(enabled=True, project="")), r"logging\.wandb\.project"),
    ],
)
def test_useless_configuration_is_refused(config: LoggingConfig, name: str) -> None:
    LoggingConfig().validate()
    with pytest.raises(UserError, match=name):
        config.validate()

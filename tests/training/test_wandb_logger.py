"""Weights & Biases, played by a fake: the same tags, and trouble that costs one warning."""

import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phase2_jax.training.logger_base import Logger
from phase2_jax.training.logging_config import WandbConfig
from phase2_jax.training.records import Record, batch_tags, epoch_tags
from phase2_jax.training.wandb_logger import RUN_ID_FILE, WandbLogger

MakeRecord = Callable[[int], Record]
LogSteps = Callable[[Logger, int, int], None]


class FakeError(Exception):
    pass


class FakeRun:
    def __init__(self, fail_at: int | None = None, **state: bool) -> None:
        self.id, self.dir = "abc123", "somewhere"
        self.disabled, self.offline = state.get("disabled", False), state.get("offline", False)
        self.fail_at = fail_at
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def log(self, tags: dict[str, float], step: int) -> None:
        if self.fail_at is not None and step >= self.fail_at:
            raise FakeError("connection\nlost")
        self.logged.append((step, tags))

    def finish(self) -> None:
        self.finished += 1


def install_fake(monkeypatch: pytest.MonkeyPatch, run: FakeRun | None) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def init(**kwargs: Any) -> FakeRun:
        calls.append(kwargs)
        if run is None:
            raise FakeError("no API key\nconfigured")
        return run

    module = types.ModuleType("wandb")
    module.__dict__.update(init=init, Error=FakeError)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_wandb_gets_the_tags_on_one_monotonic_axis(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step_record: MakeRecord,
    epoch_record: MakeRecord,
    log_steps: LogSteps,
) -> None:
    run = FakeRun()
    calls = install_fake(monkeypatch, run)
    config = WandbConfig(enabled=True, project="forgetting", name="")
    logger = WandbLogger(config, tmp_path, every=5)
    logger.on_start({"hyperparameters": {"lr": 0.5}})
    log_steps(logger, 1, 20)
    logger.close()
    steps = [step for step, _ in run.logged]
    assert steps == [1, 5, 10, 10, 15, 20, 20]
    assert dict(run.logged)[15] == batch_tags(step_record(15))
    assert run.logged[-1][1] == epoch_tags(epoch_record(2))
    assert (calls[0]["project"], calls[0]["name"], calls[0]["config"]) == ("forgetting", None, {"lr": 0.5})
    assert calls[0]["id"] is None
    assert run.finished == 1
    assert warnings_of(caplog) == []
    WandbLogger(config, tmp_path).on_start({"start_step": 20})
    assert (calls[1]["id"], calls[1]["resume"]) == ("abc123", "allow")
    assert (tmp_path / RUN_ID_FILE).exists()


@pytest.mark.parametrize(
    ("run", "warning"),
    [
        (None, "W&B logging is off: FakeError: no API key configured"),
        (FakeRun(disabled=True), "disabled"),
        (FakeRun(offline=True), "offline"),
        (FakeRun(fail_at=5), "W&B logging stops here: FakeError: connection lost"),
    ],
)
def test_wandb_trouble_is_one_warning(
    run: FakeRun | None,
    warning: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    log_steps: LogSteps,
) -> None:
    install_fake(monkeypatch, run)
    logger = WandbLogger(WandbConfig(enabled=True), tmp_path)
    logger.on_start({})
    log_steps(logger, 1, 20)
    logger.close()
    messages = warnings_of(caplog)
    assert len(messages) == 1
    assert warning in messages[0]
    assert "\n" not in messages[0]


def test_absent_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, log_steps: LogSteps
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    logger = WandbLogger(WandbConfig(enabled=True), tmp_path)
    logger.on_start({})
    log_steps(logger, 1, 10)
    logger.close()
    assert len(warnings_of(caplog)) == 1
    assert "pip install" in warnings_of(caplog)[0]

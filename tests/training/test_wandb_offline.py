"""Weights & Biases in its offline mode: the real package writes what a later `wandb sync` would send."""

import importlib.util
import json
import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phase2_jax.training.logger_base import Logger
from phase2_jax.training.logging_config import WandbConfig
from phase2_jax.training.records import Record, batch_tags, epoch_tags
from phase2_jax.training.wandb_logger import RUN_ID_FILE, WandbLogger

MakeRecord = Callable[[int], Record]
LogSteps = Callable[[Logger, int, int], None]
BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("wandb") is None, reason="wandb is not installed (make setup EXTRAS=wandb)"
    ),
]


def records(path: Path) -> Iterator[Any]:
    """The records of a run's file, which has the format of LevelDB's log: pieces that do not cross blocks."""
    protocol = importlib.import_module("wandb.proto.wandb_internal_pb2")
    content, position, pending = path.read_bytes(), FILE_HEADER, b""
    while position + RECORD_HEADER <= len(content):
        if BLOCK - position % BLOCK < RECORD_HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += RECORD_HEADER
        pending += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last piece
            yield protocol.Record.FromString(pending)
            pending = b""


def history(path: Path) -> dict[int, dict[str, Any]]:
    """Figures by step."""
    steps: dict[int, dict[str, Any]] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            step = record.history.step.num if record.history.HasField("step") else items["_step"]
            steps.setdefault(step, {}).update(items)
    return steps


def run_files(workdir: Path) -> list[Path]:
    return sorted(workdir.rglob("run-*.wandb"))


def test_offline_runs_hold_every_figure_and_resume_as_one_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step_record: MakeRecord,
    epoch_record: MakeRecord,
    log_steps: LogSteps,
) -> None:
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(tmp_path))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    config = WandbConfig(enabled=True, project="forgetting", name="first")
    logger = WandbLogger(config, tmp_path, every=5)
    logger.on_start({"hyperparameters": {"model": {"d_model": 128}}})
    log_steps(logger, 1, 10)
    logger.on_epoch(epoch_record(2) | {"sample_text": ("Once <upon", " a Γ time")}, improved=True)
    logger.close()
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "wandb sync" in message
    (path,) = run_files(tmp_path)
    logged = history(path)
    assert sorted(logged) == [1, 5, 10, 20]
    for tag, value in batch_tags(step_record(5)).items():
        assert logged[5][tag] == value
    for tag, value in epoch_tags(epoch_record(1)).items():
        assert logged[10][tag] == value
    assert logged[20]["sample_text._type"] == "html-file"
    (sample,) = tmp_path.rglob("sample_text*.html")
    assert "Once &lt;upon<b> a Γ time</b>" in sample.read_text(encoding="utf-8")
    (run,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("forgetting", "first")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["model"] == {"d_model": 128}

    resumed = WandbLogger(config, tmp_path, every=5)
    resumed.on_start({"start_step": 20})
    log_steps(resumed, 21, 25)
    resumed.close()
    identity = (tmp_path / RUN_ID_FILE).read_text().strip()
    files = run_files(tmp_path)
    assert [file.name for file in files] == [f"run-{identity}.wandb"] * 2
    assert sorted(step for file in files for step in history(file)) == [1, 5, 10, 20, 25]

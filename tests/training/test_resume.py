"""A run that was stopped and continued ends like one that never stopped."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from phase2_jax.data.config import DataConfig
from phase2_jax.errors import UserError
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.training import loop, setup, validation
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS, CheckpointDirectory
from phase2_jax.training.config import CheckpointConfig, ExperimentConfig, OptimizerConfig, TrainConfig
from phase2_jax.training.history import read_metrics
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.signals import Interrupted, StopRequest
from phase2_jax.training.train import train
from phase2_jax.training.workdir import CONFIG_FILE, TOKENIZER_FILE

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
# Wall clock and machine: the only figures that may differ.
UNREPEATABLE = ("epoch_time", "epoch_times", "tokens_per_second", "mfu", "peak_vram_mb", "current_vram_mb")


def experiment(text: Path, **train: Any) -> ExperimentConfig:
    settings: dict[str, Any] = {"num_epochs": 2, "steps_per_epoch": 4, "batch_size": 4, "seq_len": 16, "grad_accum": 2}
    settings |= train
    return ExperimentConfig(
        model=ModelConfig(
            d_model=8,
            num_layers=2,
            num_heads=2,
            head_dim=4,
            ffn_dim=8,
            dropout=0.1,
            consolidation=ConsolidationConfig(interval=8),
        ),
        data=DataConfig(path=str(text), fresh_state_fraction=0.2, random_start=True, document_separator="\n\n"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(**settings),
        checkpoint=CheckpointConfig(every_steps=3),
        logging=LoggingConfig(tensorboard=False),
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    words = ["gamma", "forgets", "what", "the", "memory", "wrote", "yesterday"]
    paragraphs = (" ".join(rng.choice(words, 12)) for _ in range(40))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(experiment(text), workdir)
    return workdir


def final_arrays(workdir: Path, name: str = CHECKPOINTS) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by its path."""
    step = max(int(path.name) for path in (workdir / name).iterdir() if path.name.isdigit())
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("model", "optimizer", "memory", "rng"):
            tree = checkpointer.restore((workdir / name / str(step) / item).absolute())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def records(workdir: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in UNREPEATABLE}
        for record in read_metrics(workdir / "metrics.jsonl")
    ]


def history(workdir: Path) -> dict:
    stored = json.loads((workdir / "training_history.json").read_text())
    return {key: value for key, value in stored.items() if key not in UNREPEATABLE}


def assert_same_run(workdir: Path, other: Path) -> None:
    for name in (CHECKPOINTS, BEST):
        arrays, expected = final_arrays(workdir, name), final_arrays(other, name)
        assert arrays.keys() == expected.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[key], err_msg=f"{name} {key}")
    assert records(workdir) == records(other)
    assert history(workdir) == history(other)


class StopAt:
    """A stop request that fires when it has been looked at often enough."""

    def __init__(self, looks: int):
        self.looks = looks

    def check(self, _request) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise Interrupted(signal.SIGTERM)


# Looks 0-3 come before the steps of epoch 1, then one for each of the validation batches, and so on.
@pytest.mark.parametrize("looks", [1, 2, 4, 6, 9])
def test_stopped_anywhere_and_resumed_ends_the_same(looks, text, undisturbed, tmp_path, monkeypatch):
    config = experiment(text)
    with monkeypatch.context() as patch:
        stop_at = StopAt(looks)
        patch.setattr(StopRequest, "check", lambda self: stop_at.check(self))
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_arrays_without_elements_are_resumed_too(text, tmp_path, monkeypatch):
    config = experiment(text)
    # No tail of the convolution.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, conv_width=1))
    train(config, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        stop_at = StopAt(6)
        patch.setattr(StopRequest, "check", lambda self: stop_at.check(self))
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_an_exception_saves_the_state_and_goes_on(text, undisturbed, tmp_path, monkeypatch, capsys):
    config = experiment(text)
    original = validation.validate

    def broken(*_):
        raise RuntimeError("a disk went away")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", broken)
        with pytest.raises(RuntimeError, match="a disk went away"):
            train(config, tmp_path / "run")
    assert original is validation.validate
    assert "emergency checkpoint of step 4" in capsys.readouterr().out
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_record_that_cannot_be_written_is_the_only_thing_lost(text, undisturbed, tmp_path, monkeypatch):
    config, write = experiment(text), loop.MetricsFile.write_step

    def full_at_two(self, record):
        if record["step"] == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(loop.MetricsFile, "write_step", full_at_two)
        with pytest.raises(OSError, match="No space left"):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert history(tmp_path / "run") == history(undisturbed)
    expected = [record for record in records(undisturbed) if (record["kind"], record["step"]) != ("step", 2)]
    assert records(tmp_path / "run") == expected


def test_interrupted_while_figures_are_fetched_nothing_is_lost(text, undisturbed, tmp_path, monkeypatch):
    config, fetch, fetched = experiment(text), jax.device_get, []

    def interrupted_once(tree):
        if isinstance(tree, dict) and "failed_step" in tree:
            fetched.append(tree)
            if len(fetched) == 2:
                raise KeyboardInterrupt
        return fetch(tree)

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", interrupted_once)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_best_model_that_could_not_be_saved_is_when_the_run_goes_on(text, tmp_path, monkeypatch):
    config, save = experiment(text, num_epochs=1), CheckpointDirectory.save
    with monkeypatch.context() as patch:
        patch.setattr(
            CheckpointDirectory,
            "save",
            lambda self, *arguments: (full_disk if self.directory.name == BEST else save)(self, *arguments),
        )
        with pytest.raises(OSError, match="No space left"):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    train(config, tmp_path / "undisturbed")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_a_checkpoint_of_another_version_is_not_to_be_deleted(text, tmp_path, monkeypatch):
    config, run = experiment(text, num_epochs=1), tmp_path / "run"
    train(config, run)
    monkeypatch.setattr(setup, "make_optimizer", lambda *_: optax.sgd(1e-3, momentum=0.9))
    with pytest.raises(UserError, match=r"holds other arrays [^\n]* use the version that wrote it"):
        train(config, run)
    assert (run / CHECKPOINTS / "4" / "optimizer").is_dir()


def test_a_checkpoint_just_written_is_not_written_again(text, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(experiment(text), checkpoint=CheckpointConfig(every_steps=3, keep=1))
    save, stop_at = CheckpointDirectory.save, StopAt(3)

    def save_once(self, state, progress):
        save(self, state, progress)
        monkeypatch.setattr(CheckpointDirectory, "save", full_disk)

    monkeypatch.setattr(StopRequest, "check", lambda self: stop_at.check(self))
    monkeypatch.setattr(CheckpointDirectory, "save", save_once)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    assert "No emergency checkpoint" not in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()] == ["3"]


def test_a_checkpoint_stays_until_its_replacement_is_whole(text, tmp_path, monkeypatch, capsys):
    # Stopped at its last step, a run has a checkpoint of it from before the validation.
    config = dataclasses.replace(experiment(text, num_epochs=1), checkpoint=CheckpointConfig(keep=1))
    with monkeypatch.context() as patch:
        stop_at = StopAt(4)
        patch.setattr(StopRequest, "check", lambda self: stop_at.check(self))
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train(config, tmp_path / "run")
    assert "No emergency checkpoint of step 4" in capsys.readouterr().out
    train(config, tmp_path / "run")
    train(config, tmp_path / "undisturbed")
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    assert [path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir()] == ["4"]


def test_a_signal_that_ends_the_compiler_interrupts(text, tmp_path, monkeypatch):
    def compile_in_vain(*_):
        signal.raise_signal(signal.SIGTERM)
        raise jax.errors.JaxRuntimeError("INTERNAL: Pass pipeline failed")

    monkeypatch.setattr(loop.Trainer, "_step", compile_in_vain)
    with pytest.raises(Interrupted):
        train(experiment(text), tmp_path / "run")


def test_other_text_or_shape_is_refused(text, undisturbed, tmp_path):
    config = experiment(text)
    with pytest.raises(UserError, match=r"train\.batch_size is 2 but this run was started with 4"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=2)), undisturbed)
    content = text.read_text()
    try:
        text.write_text(content.replace("gamma", "gauss"))
        with pytest.raises(UserError, match="text or tokenizer is not the one"):
            train(config, undisturbed)
    finally:
        text.write_text(content)


def from_file(config: ExperimentConfig, path: Path) -> ExperimentConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path), tokenizer="words"))


def test_a_text_may_move_but_another_leaves_the_run_as_it_is(text, tmp_path, monkeypatch):
    config, workdir = from_file(experiment(text), text), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at = StopAt(6)
        patch.setattr(StopRequest, "check", lambda self: stop_at.check(self))
        with pytest.raises(Interrupted):
            train(config, workdir)
    described = [workdir / CONFIG_FILE, workdir / TOKENIZER_FILE]
    before = [file.read_text() for file in described]
    other, moved = tmp_path / "other.txt", tmp_path / "moved.txt"
    other.write_text(text.read_text().replace("gamma", "gauss"))
    with pytest.raises(UserError, match="text or tokenizer is not the one"):
        train(from_file(config, other), workdir)
    assert [file.read_text() for file in described] == before
    moved.write_text(text.read_text())
    train(from_file(config, moved), workdir)
    train(config, tmp_path / "undisturbed")
    assert_same_run(workdir, tmp_path / "undisturbed")
    assert json.loads(described[0].read_text())["config"]["data"]["path"] == str(moved)


def test_history_has_every_curve(undisturbed):
    stored = history(undisturbed)
    assert stored["total_epochs"] == 2
    assert len(stored["train_losses"]) == len(stored["val_losses"]) == len(stored["learning_rates"]) == 2
    for name, keys in {
        "gamma_history": ("mean", "std", "min", "max"),
        "snr_history": ("mean", "low_ratio"),
        "resonance_history": ("modes", "energy"),
        "stability_history": ("stable_ratio", "energy"),
    }.items():
        for entry in stored[name]:
            assert all(np.isfinite(entry[key]) for key in keys)
            assert len(entry["per_layer"]) == 2
    assert min(stored["val_losses"]) == stored["best_val_loss"]


def start_process(workdir: Path, text: Path) -> subprocess.Popen:
    settings = {
        "model.d_model": 8,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.head_dim": 4,
        "model.ffn_dim": 8,
        "model.consolidation.interval": 8,
        "train.seq_len": 16,
        "train.batch_size": 4,
        "train.num_steps": 400,
        "train.steps_per_epoch": 100,
        "train.num_val_batches": 2,
        "checkpoint.every_steps": 20,
        "logging.tensorboard": False,
        "data.path": text,
    }
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_steps(workdir: Path, steps: int, process: subprocess.Popen) -> None:
    for _ in range(3000):
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            return
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.1)
    raise AssertionError("the run made no progress")


@pytest.fixture(scope="module")
def whole_process(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    process = start_process(workdir, text)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    return workdir


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_killed_process_continues_to_the_same_end(signum, status, text, whole_process, tmp_path):
    workdir = tmp_path / "run"
    process = start_process(workdir, text)
    wait_for_steps(workdir, 47, process)
    process.send_signal(signum)
    output = process.communicate()[0].decode()
    assert process.returncode == status, output
    if signum != signal.SIGKILL:
        assert "checkpoint of step" in output
        assert "Traceback" not in output
    process = start_process(workdir, text)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, output
    assert "Resumed from step" in output
    assert_same_run(workdir, whole_process)

"""What a run's folder must still hold to be continued, and what is said and kept where it does not."""

import dataclasses
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phase2_jax.data.config import DataConfig
from phase2_jax.errors import UserError
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS, REPLACED
from phase2_jax.training.config import CheckpointConfig, ExperimentConfig, TrainConfig
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.run_info import count_epochs
from phase2_jax.training.train import train


def experiment(text: Path) -> ExperimentConfig:
    text.write_text("What the memory wrote yesterday it forgets today.\n" * 20)
    return ExperimentConfig(
        model=ModelConfig(
            d_model=8, num_layers=1, num_heads=1, head_dim=4, ffn_dim=8, consolidation=ConsolidationConfig(interval=8)
        ),
        data=DataConfig(path=str(text)),
        train=TrainConfig(num_steps=2, batch_size=2, seq_len=16, num_val_batches=1),
        checkpoint=CheckpointConfig(every_steps=0),
        logging=LoggingConfig(tensorboard=False),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[ExperimentConfig, Path]:
    """A run of two steps, both of its checkpoints at step 2."""
    folder = tmp_path_factory.mktemp("finished")
    config = experiment(folder / "text.txt")
    train(config, folder / "run")
    return config, folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> tuple[ExperimentConfig, Path]:
    """The same to be broken."""
    config, workdir = finished
    return config, shutil.copytree(workdir, tmp_path / "run")


def contents(workdir: Path) -> dict[str, bytes]:
    files = [path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


@pytest.mark.parametrize("missing", [CHECKPOINTS, f"{CHECKPOINTS}/2"])
def test_a_run_with_its_best_checkpoint_alone_is_left_as_it_is(run, missing):
    config, workdir = run
    shutil.rmtree(workdir / missing)
    before = contents(workdir)
    with pytest.raises(UserError, match=rf"copy \S+{BEST}/2 into \S+ to continue from there, or choose another"):
        train(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, beta1=0.5)), workdir)
    assert contents(workdir) == before


def test_the_best_checkpoint_is_a_way_back(run):
    config, workdir = run
    metrics = (workdir / "metrics.jsonl").read_text()
    shutil.rmtree(workdir / CHECKPOINTS / "2")
    shutil.copytree(workdir / BEST / "2", workdir / CHECKPOINTS / "2")
    assert train(config, workdir).steps == [2]
    assert (workdir / "metrics.jsonl").read_text() == metrics


def test_a_checkpoint_set_aside_counts(run):
    config, workdir = run
    (workdir / CHECKPOINTS / "2").rename(workdir / CHECKPOINTS / f"{REPLACED}2")
    with pytest.raises(UserError, match=r"train\.seq_len is 8 but this run was started with 16"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=8)), workdir)
    assert train(config, workdir).steps == [2]


@pytest.mark.parametrize(
    ("best", "remedy"),
    [(True, rf"none before it: delete that folder, copy \S+{BEST}/2 into"), (False, "none before it: choose another")],
)
def test_the_only_checkpoint_has_none_before_it(run, best, remedy):
    config, workdir = run
    for file in (workdir / CHECKPOINTS / "2" / "progress").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    if not best:
        shutil.rmtree(workdir / BEST)
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read .*" + remedy) as caught:
        train(config, workdir)
    assert not re.search("the one before it|\n", str(caught.value))


@pytest.mark.parametrize(
    ("total_steps", "step", "closed", "num_open", "epochs"),
    [
        (16, 0, 0, 0, 2),
        (20, 0, 0, 0, 3),
        (20, 9, 1, 1, 3),
        (16, 8, 0, 8, 2),  # stopped before the validation
        (8, 6, 1, 0, 2),  # six steps were the whole run, two more are another epoch
        (16, 6, 1, 0, 3),
        (6, 6, 1, 0, 1),
        (6, 6, 0, 6, 1),
        (4, 6, 0, 6, 1),  # shortened
    ],
)
def test_epochs_are_counted_with_those_closed_early(total_steps, step, closed, num_open, epochs):
    run: Any = SimpleNamespace(steps_per_epoch=8, total_steps=total_steps)
    assert count_epochs(run, step, closed, num_open) == epochs


def test_a_run_made_longer_counts_the_epoch_it_had_closed(run, capsys):
    config, workdir = run
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=3)), workdir)
    assert "Epoch 2/2 Summary" in capsys.readouterr().out


def test_a_refused_setting_says_what_may_change(finished):
    config, workdir = finished
    with pytest.raises(UserError, match=r"train\.early_stopping\.\*, train\.profile_steps, logging\.\*"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1)), workdir)


def test_a_run_stopped_before_its_first_checkpoint_starts_anew(run):
    config, workdir = run
    for name in (CHECKPOINTS, BEST):
        shutil.rmtree(workdir / name)
    assert train(config, workdir).steps == [2]
    assert (workdir / "metrics.jsonl").read_text().count('"kind": "step"') == 2

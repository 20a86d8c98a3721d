"""benchmarks/task_accuracy.py: what it prints, and one line for every mistake."""

import json
from dataclasses import replace

import pytest

from benchmarks import task_accuracy
from phase2_jax.data.config import DataConfig, TaskConfig
from phase2_jax.inference.loading import LoadedModel
from phase2_jax.model.config import ModelConfig
from phase2_jax.training.config import ExperimentConfig, TrainConfig
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.train import train

TASK = TaskConfig(name="mqar", vocab_size=16, num_items=2)


def status_of(monkeypatch, *arguments: str) -> object:
    monkeypatch.setattr("sys.argv", ["task_accuracy.py", *arguments])
    try:
        task_accuracy.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the program, up to the first cell, on a run of `task`; gives status, stdout and stderr."""

    def run(task: TaskConfig, *arguments: str):
        config = ExperimentConfig(data=DataConfig(mode="windows", task=task))
        loaded = LoadedModel(config, config.model, None, None, tmp_path, 1)  # pyright: ignore[reportArgumentType]
        if f"--workdir={tmp_path}" in arguments:
            monkeypatch.setattr(task_accuracy, "load_model", lambda *_: loaded)
        status = status_of(monkeypatch, *arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.slow
def test_every_cell_has_its_accuracy_however_it_is_read(monkeypatch, capsys, tmp_path):
    config = ExperimentConfig(
        model=ModelConfig(d_model=8, num_layers=1, num_heads=1, head_dim=4, ffn_dim=-1, resolvent=False),
        data=DataConfig(mode="windows", task=replace(TASK, num_valid=4)),
        train=TrainConfig(num_steps=1, batch_size=2, seq_len=8),
        logging=LoggingConfig(tensorboard=False),
    )
    train(config, tmp_path / "run")
    capsys.readouterr()
    results = []
    for window in ("16", "8"):
        arguments = f"--workdir={tmp_path / 'run'} --cells=8,16:4 --examples=20 --batch_size=10 --window={window}"
        assert status_of(monkeypatch, *arguments.split()) == 0
        results.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert results[0] == results[1]
    assert [(cell["cell"], cell["scored"]) for cell in results[0]] == [("8", 40), ("16:4", 80)]
    # About one in sixteen is right by chance.
    assert all(0 <= cell["accuracy"] < 0.5 for cell in results[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cells=64",), "--workdir is missing"),
        (("--workdir=absent", "--cells=64"), "--workdir=absent does not exist"),
        (("--workdir=RUN",), "--cells is missing"),
        (("--workdir=RUN", "--cells=abc"), "--cells=abc is no test set"),
        (("--workdir=RUN", "--cells=64:"), "--cells=64: is no test set"),
        (("--workdir=RUN", "--cells=64:0"), "--cells=64:0 is no test set"),
        (("--workdir=RUN", "--cells=12:4"), "--cells=12:4 is too short for mqar with 4 items: it needs LENGTH 16"),
        (("--workdir=RUN", "--cells=640:100"), "--cells=640:100: "),
        (("--workdir=RUN", "--cells=64", "--window=0"), "--window=0 must be at least 1"),
        (("--workdir=RUN", "--cells=64", "--examples=0"), "--examples=0 must be at least 1"),
    ],
)
def test_a_mistake_gets_one_line(run, tmp_path, arguments, said):
    status, out, err = run(TASK, *(argument.replace("RUN", str(tmp_path)) for argument in arguments))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert "train.seq_len" not in err


def test_a_run_of_a_text_is_for_evaluate(run, tmp_path):
    status, _, err = run(replace(TASK, name=""), f"--workdir={tmp_path}", "--cells=64")
    assert status == 2
    assert "was trained on a text, not on a task: use evaluate.py" in err

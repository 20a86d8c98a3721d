"""benchmarks/task_accuracy.py: what it prints, and one line for every mistake."""

import json
from dataclasses import replace

import jax
import pytest

from benchmarks import task_accuracy
from phase2_jax.data.config import DataConfig, TaskConfig
from phase2_jax.inference.loading import LoadedModel
from phase2_jax.training.config import ExperimentConfig

TASK = TaskConfig(name="mqar", vocab_size=16, num_items=2)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the program on a run of `task`; gives status, stdout and stderr. Nothing is computed."""

    def run(task: TaskConfig, *arguments: str):
        config = ExperimentConfig(data=DataConfig(mode="windows", task=task))
        loaded = LoadedModel(config, config.model, None, None, tmp_path, 1)  # pyright: ignore[reportArgumentType]
        if f"--workdir={tmp_path}" in arguments:
            monkeypatch.setattr(task_accuracy, "load_model", lambda *_: loaded)
            monkeypatch.setattr(LoadedModel, "graphdef", lambda *_: None)
            monkeypatch.setattr(task_accuracy, "init_state", lambda *_: None)
            monkeypatch.setattr(task_accuracy, "eval_step", lambda *_: ({"right": 1.0, "count": 2.0}, None, None))
            monkeypatch.setattr(jax, "jit", lambda function: function)
        monkeypatch.setattr("sys.argv", ["task_accuracy.py", *arguments])
        status = 0
        try:
            task_accuracy.main()
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_cells_are_printed(run, tmp_path):
    status, out, _ = run(TASK, f"--workdir={tmp_path}", "--cells=8,16:4", "--examples=3", "--batch_size=2")
    assert status == 0
    assert [json.loads(line)["cell"] for line in out.splitlines()] == ["8", "16:4"]
    assert json.loads(out.splitlines()[0])["accuracy"] == 0.5


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

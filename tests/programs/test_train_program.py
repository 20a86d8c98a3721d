"""The command line: every mistake gets one line that names it, and a status that is not 0."""

import errno
import json
from pathlib import Path

import pytest
from absl import flags

from phase2_jax.data.config import DataConfig
from phase2_jax.errors import UserError
from phase2_jax.programs import train as program
from phase2_jax.training.config import ExperimentConfig
from phase2_jax.training.history import MetricsFile
from phase2_jax.training.train import train
from phase2_jax.training.workdir import plain, write_config

REPOSITORY = Path(__file__).parents[2]
TINY = f"--config={REPOSITORY / 'configs' / 'tiny.py'}"
# The smallest run there is: what these tests look at happens before or around the steps.
SMALL = (
    "--config.model.d_model=8",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.head_dim=4",
    "--config.model.ffn_dim=8",
    "--config.model.consolidation.interval=8",
    "--config.train.seq_len=16",
    "--config.train.batch_size=2",
    "--config.train.num_val_batches=1",
    "--config.train.num_steps=2",
    "--config.train.steps_per_epoch=2",
    "--config.logging.tensorboard=False",
)


def run(*arguments: str) -> int:
    """Run the program in this process; returns its exit status."""
    flags.FLAGS.unparse_flags()
    for name in ("config", "workdir", "resume", "lr_find"):
        flags.FLAGS[name].unparse()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            program.main()
    code = exit_info.value.code
    return code if isinstance(code, int) else int(code is not None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--config is missing"),
        (("--config=configs/absent.py", "--workdir=w"), "absent.py"),
        ((TINY,), "--workdir is missing"),
        ((f"{TINY}:foo", "--workdir=w"), "tiny.py has no variants: leave out :foo"),
        ((TINY, "--workdir=w", "extra"), "unexpected argument 'extra'"),
        ((TINY, "--workdir=w", "--config.model.d_modell=3"), "did you mean d_model?"),
        ((TINY, "--workdir=w", "--config.modle.d_model=3"), "did you mean model?"),
        ((TINY, "--workdir=w", "--config.model=3"), "is a group"),
        ((TINY, "--workdir=w", "--config.model.d_model.x=3"), "not a group"),
        ((TINY, "--workdir=w", "--config.model.d_model=many"), "must be of type int"),
        ((TINY, "--workdir=w", "--config.model.d_model=1.5"), "must be of type int"),
        ((TINY, "--workdir=w", "--config.model.resolvent=perhaps"), "must be of type bool"),
        ((TINY, "--workdir=w", "--config.model.base_decay=0"), "model.base_decay=0.0 must be greater than 0"),
        ((TINY, "--workdir=w", "--config.model.base_decay=-1"), "model.base_decay=-1.0"),
        ((TINY, "--workdir=w", "--config.model.base_decay=nan"), "model.base_decay=nan"),
        ((TINY, "--workdir=w", "--config.model.snr.threshold=-1"), "model.snr.threshold=-1.0"),
        ((TINY, "--workdir=w", "--config.model.resonance.threshold=2"), "model.resonance.threshold=2.0"),
        ((TINY, "--workdir=w", "--config.model.num_heads=0"), "model.num_heads=0"),
        ((TINY, "--workdir=w", "--config.model.head_dim=2100"), "model.head_dim=2100"),
        ((TINY, "--workdir=w", "--config.model.epsilon_min=0.5"), "model.epsilon_min=0.5"),
        ((TINY, "--workdir=w", "--config.model.bk_mode=bidirectional"), "model.encoder=True"),
        ((TINY, "--workdir=w", "--config.model.vocab_size=100"), "smaller than the tokenizer's 256"),
        ((TINY, "--workdir=w", "--config.model.dtype=float16"), "model.dtype='float16'"),
        ((TINY, "--workdir=w", "--config.train.grad_accum=3"), "must divide"),
        ((TINY, "--workdir=w", "--config.train.batch_size=100000"), "lower one of them"),
        ((TINY, "--workdir=w", "--config.sharding.tensor=2"), "only the data axis"),
        ((TINY, "--workdir=w", "--config.sharding.data=64"), "devices"),
        ((TINY, "--workdir=w", "--config.kernels.implementation=cuda"), "kernels.implementation='cuda'"),
        ((TINY, "--workdir=w", "--config.kernels.implementation=mosaic"), "needs an NVIDIA GPU"),
        ((TINY, "--workdir=w", "--config.kernels.unroll_layers=maybe"), "kernels.unroll_layers='maybe'"),
        ((TINY, "--workdir=w", "--config.optimizer.learning_rate=-1"), "optimizer.learning_rate=-1.0"),
        ((TINY, "--workdir=w", "--config.data.path=absent.txt"), "absent.txt"),
        ((TINY, "--workdir=w", "--config.data.tokenizer=bpe"), "data.tokenizer='bpe'"),
        ((TINY, "--workdir=w", "--config.checkpoint.keep=0"), "checkpoint.keep=0"),
        ((TINY, "--workdir=w", "--config.logging.batch_every=0"), "logging.batch_every"),
        ((TINY, "--workdir=w", f"--config.train.seed={2**31}"), f"train.seed={2**31} must be at most {2**31 - 1}"),
        ((TINY, "--workdir=w", "--config.train.seed=-1"), "train.seed=-1 must be"),
        ((TINY, "--workdir=w", f"--config.train.num_steps={2**31}"), f"train.num_steps={2**31} must be at most"),
        ((TINY, "--workdir=w", f"--config.train.num_epochs={2**30}"), f"train.num_epochs={2**30} epochs of"),
        ((TINY, "--workdir=w", f"--config.model.d_model={2**40}"), f"model.d_model={2**40} must be at most"),
        ((TINY, "--workdir=w", f"--config.data.task.seed={2**63}"), f"data.task.seed={2**63} must be at most"),
    ],
)
def test_a_mistake_gets_one_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = run(*arguments)
    errors = capsys.readouterr().err.splitlines()
    assert status == 2
    assert len([line for line in errors if line.startswith("error: ")]) == 1
    assert said in errors[-1]
    assert "Traceback" not in "".join(errors)
    # Nothing of a run that never began stays behind.
    assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("c.model.d_modle = 3", "line 4: d_modle does not exist: did you mean d_model?"),
        ("c.model.num_heads = '3'", "cannot be casted to type <class 'int'>"),
        ("c.model.num_heads = (3", "line 4: '(' was never closed"),
    ],
)
def test_a_mistake_in_a_configuration_file_gets_one_line(line, said, tmp_path, capsys):
    head = "from phase2_jax.training.config import default_config\ndef get_config():\n    c = default_config()\n"
    (tmp_path / "mine.py").write_text(f"{head}    {line}\n    return c\n")
    assert run(f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'w'}") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert len(error) < 400


def test_ctrl_c_before_the_first_step_gets_one_line(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "train", interrupted)
    assert run(TINY, f"--workdir={tmp_path / 'w'}") == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("error", "path"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "w/metrics.jsonl"), "w/metrics.jsonl"),
        (OSError(errno.ENOSPC, "No space left on device"), "w"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [OS error 28: ENOSPC]"), "w"),
    ],
)
def test_a_full_disk_gets_one_line(error, path, monkeypatch, capsys):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(program, "train", full)
    assert run(TINY, "--workdir=w") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} cannot be written to (No space left on device): make room there")
    assert said.count("\n") == 1


def test_other_exceptions_keep_their_traceback(monkeypatch):
    def broken(*_, **__):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(program, "train", broken)
    flags.FLAGS.unparse_flags()
    with pytest.raises(BrokenPipeError):
        run(TINY, "--workdir=w")


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_after_a_checkpoint(tmp_path, monkeypatch, capsys):
    def full(self, record):
        raise OSError(errno.ENOSPC, "No space left on device", str(self.path))

    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write_step", full)
        assert run(TINY, f"--workdir={workdir}", *SMALL) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert f"error: {workdir / 'metrics.jsonl'} cannot be written to" in output.err
    assert "emergency checkpoint of step" in output.out
    assert run(TINY, f"--workdir={workdir}", *SMALL) == 0


def test_a_platform_without_a_device_gets_one_line(tmp_path, monkeypatch, capsys):
    def absent(*_):
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr("jax.devices", absent)
    assert run(TINY, *SMALL, f"--workdir={tmp_path / 'w'}") == 2
    assert "JAX finds no device (JAX_PLATFORMS='cuda')" in capsys.readouterr().err


def test_text_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "long.txt").write_text("a line of text\n" * 40)
    (tmp_path / "one.txt").write_text("a")
    for name, said in (
        ("empty.txt", "empty"),
        ("short.txt", "tokens"),
        ("long.txt --config.data.valid_path=one.txt", "the validation text has fewer than 2 tokens"),
    ):
        assert run(TINY, "--workdir=w", *SMALL, *f"--config.data.path={name}".split()) == 2
        assert said in capsys.readouterr().err
    # Nothing was written before.
    assert [path.name for path in (tmp_path / "w").iterdir()] == [".lock"]


def test_workdirs_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert run(TINY, "--workdir=file") == 2
    assert "cannot be written to" in capsys.readouterr().err
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    assert run(TINY, "--workdir=foreign") == 2
    assert "holds no run" in capsys.readouterr().err
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
def test_a_run_is_continued_finished_and_guarded(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    run_status = run(TINY, workdir, *SMALL)
    assert run_status == 0
    assert "Training completed" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["config"]["model"]["d_model"] == 8
    assert stored["overrides"]["model.d_model"] == 8
    assert stored["versions"]["jax"]
    plots = {path.name for path in (tmp_path / "run" / "plots").iterdir()}
    assert plots == {"learning_curves.png", "gamma_evolution.png"}

    assert run(TINY, workdir, *SMALL) == 0
    assert "finished at step 2" in capsys.readouterr().out

    assert run(TINY, workdir, *SMALL, "--config.train.num_steps=4") == 0
    assert "Resumed from step 2" in capsys.readouterr().out

    assert run(TINY, workdir, *SMALL, "--config.model.d_model=12") == 2
    assert "config.model.d_model is 12 but this run was started with 8" in capsys.readouterr().err

    assert run(TINY, workdir, *SMALL, "--noresume") == 2
    assert "already holds a run" in capsys.readouterr().err

    history = tmp_path / "run" / "training_history.json"
    written = history.read_text()
    history.write_text("{")
    assert run(TINY, workdir, *SMALL, "--config.train.num_steps=4") == 0
    assert "raise train.num_steps" in capsys.readouterr().out
    assert history.read_text() == written

    # The arrays themselves: lists of what a checkpoint holds are still whole.
    largest = max((tmp_path / "run" / "checkpoints" / "4" / "model").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    assert run(TINY, workdir, *SMALL, "--config.train.num_steps=6") == 2
    message = capsys.readouterr().err
    assert "cannot be read" in message
    assert "delete that folder" in message
    assert message.count("\n") == 1


def test_a_run_without_a_checkpoint_may_be_started_otherwise(tmp_path):
    folder = tmp_path / "run"
    write_config(folder_with_empty_checkpoints(folder), plain(ExperimentConfig()), {}, "phase2")
    # Refused for what it is now, not for what differs from then.
    with pytest.raises(UserError, match="does not exist"):
        train(ExperimentConfig(data=DataConfig(path=str(tmp_path / "absent.txt"))), folder)


def folder_with_empty_checkpoints(folder: Path) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_a_diverging_run_keeps_its_last_good_state(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    hot = (
        "--config.optimizer.learning_rate=1e30",
        "--config.optimizer.gradient_clip_norm=0",
        "--config.train.num_steps=9",
    )
    assert run(TINY, workdir, *SMALL, "--config.train.steps_per_epoch=9", *hot) == 2
    output = capsys.readouterr()
    assert "not finite" in output.err or "went bad" in output.err
    assert "step " in output.err
    assert "emergency checkpoint" in output.out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert max(saved) == max(steps)

"""When a run stops, what it says about memory, the traces it writes, and the learning rate it suggests."""

import dataclasses
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from phase2_jax.data.config import DataConfig
from phase2_jax.errors import UserError
from phase2_jax.memory.config import ConsolidationConfig
from phase2_jax.model.config import ModelConfig
from phase2_jax.reporting.plots import learning_rate_test
from phase2_jax.training import loop, lr_finder
from phase2_jax.training import workdir as workdirs
from phase2_jax.training.checkpoints import BEST, CHECKPOINTS
from phase2_jax.training.config import CheckpointConfig, EarlyStoppingConfig, ExperimentConfig, TrainConfig
from phase2_jax.training.early_stopping import epochs_without_improvement
from phase2_jax.training.history import TrainingHistory
from phase2_jax.training.logging_config import LoggingConfig
from phase2_jax.training.lr_finder import RangeTest, find_learning_rate, smooth, suggest, write_range_test
from phase2_jax.training.memory_budget import MemoryBudget, explain, is_out_of_memory, remedy, size
from phase2_jax.training.train import train

MEBIBYTE = 2**20


def experiment(folder: Path, early: EarlyStoppingConfig | None = None, profile_steps: str = "") -> ExperimentConfig:
    (folder / "text.txt").write_text("What the memory wrote yesterday it forgets today.\n" * 40)
    return ExperimentConfig(
        model=ModelConfig(
            d_model=8, num_layers=2, num_heads=2, head_dim=4, ffn_dim=8, consolidation=ConsolidationConfig(interval=8)
        ),
        data=DataConfig(path=str(folder / "text.txt")),
        train=TrainConfig(
            num_epochs=5,
            steps_per_epoch=2,
            batch_size=2,
            seq_len=16,
            num_val_batches=1,
            early_stopping=early or EarlyStoppingConfig(),
            profile_steps=profile_steps,
        ),
        checkpoint=CheckpointConfig(every_steps=0, every_epochs=1, keep=9),
        logging=LoggingConfig(tensorboard=False),
    )


@pytest.mark.parametrize(
    ("losses", "min_delta", "epochs"),
    [
        ([], 0.0, 0),
        ([3.0], 0.0, 0),
        ([3.0, 2.0, 2.0, 2.1], 0.0, 2),
        ([3.0, 2.9, 2.8, 2.7], 0.25, 0),  # many small steps are a large one in the end
        ([3.0, 2.9, 2.8], 0.25, 2),
        ([3.0, None, 3.5], 0.0, 2),
        ([None, None], 0.0, 2),
        ([None, 3.0], 0.0, 0),
    ],
)
def test_epochs_without_improvement(losses: list[float | None], min_delta: float, epochs: int) -> None:
    assert epochs_without_improvement(losses, min_delta) == epochs


@pytest.mark.slow
def test_early_stop_is_exact_when_resumed_and_can_be_lifted(tmp_path: Path, capsys) -> None:
    # No loss falls by 100: the first epoch sets the mark, two more use up the patience.
    config = experiment(tmp_path, EarlyStoppingConfig(patience=2, min_delta=100.0), profile_steps="3:4")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(config, straight).total_epochs == 3
    output = capsys.readouterr().out
    assert "Stopped early: no better validation loss in 2 epochs" in output
    assert "Estimated memory of a step: " in output
    assert "head.kernel" in output
    assert_is_trace_of(straight / "profile", [3, 4])
    # A kill after the second epoch: the end must be the same.
    shutil.copytree(straight, resumed)
    for path in [*(resumed / CHECKPOINTS).iterdir(), *(resumed / BEST).iterdir()]:
        if path.name.isdigit() and int(path.name) > 4:
            shutil.rmtree(path)
    assert train(config, resumed).total_epochs == 3
    assert TrainingHistory.read(resumed).val_losses == TrainingHistory.read(straight).val_losses
    capsys.readouterr()
    train(config, straight)
    assert "finished at step 6: raise train.early_stopping.patience to go on" in capsys.readouterr().out
    patient = dataclasses.replace(config, train=dataclasses.replace(config.train, early_stopping=EarlyStoppingConfig()))
    assert train(patient, straight).total_epochs == 5


def assert_is_trace_of(folder: Path, steps: list[int]) -> None:
    """What Perfetto opens, and what xprof reads, both with the steps named."""
    (perfetto,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    named = {event["args"]["step_num"] for event in events if event.get("name") == "train"}
    assert named == {str(step) for step in steps}
    (profile,) = folder.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(profile))
    names = [event.name for plane in data.planes for line in plane.lines for event in line.events]
    assert names.count("train") == len(steps)


@pytest.mark.slow
def test_out_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment(tmp_path)
    monkeypatch.setattr(loop, "memory_limit", lambda _: 2**14)
    real = loop.Trainer._step

    def step(self: loop.Trainer, batch):
        state, metrics = real(self, batch)
        if self.step == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5242880 bytes.")
        return state, metrics

    monkeypatch.setattr(loop.Trainer, "_step", step)
    with pytest.raises(
        UserError, match=r"it asked for 5 MiB more.*a step needs about .* the device has 16 KiB"
    ) as info:
        train(config, tmp_path / "run")
    assert "lower model.d_model" in str(info.value)


def test_remedies_fit_the_device() -> None:
    train = TrainConfig(batch_size=8, seq_len=512, grad_accum=1)
    plan = MemoryBudget(parameters=100 * MEBIBYTE, optimizer=200 * MEBIBYTE, memory=0, working=1600 * MEBIBYTE)
    # 0.9 of 1,000 MiB leave 600 for activations: 1,600 have to shrink 2.67-fold, and 8 rows divide by 4 next.
    text = remedy(plan, train, 1000 * MEBIBYTE)
    assert "train.grad_accum from 1 to 4" in text
    assert "train.batch_size from 8 to 3" in text
    assert "train.seq_len from 512 to 192" in text
    assert "model.remat=True" in text
    # The state alone is too large: no batch is small enough.
    assert "lower model.d_model" in remedy(plan, train, 330 * MEBIBYTE)
    # Nothing is known: half of everything.
    assert "train.batch_size from 8 to 4" in remedy(None, train, None)
    # Four devices take a row each: two micro-batches more would leave some without.
    spread = remedy(None, TrainConfig(batch_size=8, seq_len=64, grad_accum=2), None, 4)
    assert "grad_accum" not in spread
    assert "batch_size" not in spread
    assert "train.grad_accum from 2 to 4" in remedy(None, TrainConfig(batch_size=8, seq_len=64, grad_accum=2), None)
    # One row cannot be split: only shorter sequences are left.
    single = remedy(None, TrainConfig(batch_size=1, seq_len=64), None)
    assert "grad_accum" not in single
    assert "batch_size" not in single
    assert "train.seq_len from 64 to 32" in single


def test_only_out_of_memory_is_explained() -> None:
    assert is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying"))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    assert not is_out_of_memory(MemoryError())
    message = str(explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"), None, TrainConfig(), None))
    assert message.startswith("out of memory. Raise train.grad_accum from 1 to 2")
    assert "\n" not in message
    assert (size(5), size(1536), size(3 * 2**30)) == ("5 B", "1.5 KiB", "3 GiB")


def falling_curve() -> tuple[np.ndarray, np.ndarray]:
    """Flat, falls fastest at a rate of 0.01, lowest near 0.1, rises; noise of 0.02."""
    rates = np.geomspace(1e-6, 1.0, 100)
    fall = -2.0 / (1.0 + np.exp(-3.0 * np.log10(rates / 0.01)))
    rise = 30.0 * np.maximum(np.log10(rates / 0.1), 0.0) ** 2
    return rates, 6.0 + fall + rise + np.random.default_rng(0).normal(0.0, 0.02, rates.size)


def test_suggestion_is_at_the_steepest_fall() -> None:
    rates, losses = falling_curve()
    # Smoothing over 4 steps blurs by a quarter of a decade.
    assert 0.01 / 1.8 < suggest(rates, losses) < 0.01 * 1.8
    np.testing.assert_allclose(smooth(np.full(7, 2.5)), 2.5, rtol=1e-12)


@pytest.mark.parametrize("losses", [np.empty(0), np.array([2.0]), np.linspace(2.0, 9.0, 30)])
def test_no_fall_is_a_user_error(losses: np.ndarray) -> None:
    with pytest.raises(UserError, match="did not fall"):
        suggest(np.geomspace(1e-6, 1.0, losses.size), losses)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    holder = "import sys; sys.path[0] = '.'; from pathlib import Path; from phase2_jax.training.workdir import locked\n"
    holder += f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(UserError, match=f"trained by process {process.pid}"):
            train(experiment(tmp_path / ".."), tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        process.kill()
    with workdirs.locked(tmp_path):
        pass


def test_range_test_leaves_a_plot_where_the_run_may_follow(tmp_path: Path) -> None:
    rates, losses = falling_curve()
    test = RangeTest(rates, losses, smooth(losses), 0.01)
    (tmp_path / "run" / "plots").mkdir(parents=True)
    path = write_range_test(test, tmp_path / "run" / "plots")
    stored = json.loads(path.read_text())
    assert stored["suggestion"] == 0.01
    assert len(stored["learning_rates"]) == len(stored["losses"]) == 100
    assert workdirs.open_workdir(tmp_path / "run", resume=True) is None
    axes = learning_rate_test(test).axes[0]
    assert axes.get_xscale() == "log"
    assert np.asarray(axes.get_lines()[2].get_xdata(), np.float64).tolist() == [0.01, 0.01]


@pytest.mark.slow
def test_range_test_trains_with_rising_rates_and_stops_when_it_diverges(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lr_finder, "HIGHEST", 1e4)
    test = find_learning_rate(experiment(tmp_path), num_steps=50)
    assert test.rates[0] == pytest.approx(1e-6)
    ratios = test.rates[1:] / test.rates[:-1]
    # A schedule in float32.
    np.testing.assert_allclose(ratios, 1e10 ** (1 / 49), rtol=1e-4)
    assert 3 < test.rates.size < 50
    assert np.isfinite(test.losses).all()
    assert 1e-4 < test.suggestion < 1.0


@pytest.mark.parametrize("steps", ["10", "5:", ":5", "0:3", "5:4", "a:b", "1:2:3", "-1:3"])
def test_profile_steps_that_make_no_sense(steps: str) -> None:
    with pytest.raises(UserError, match=r"train\.profile_steps"):
        TrainConfig(profile_steps=steps).validate()
    TrainConfig(profile_steps="10:15").validate()


def test_early_stopping_settings_are_checked() -> None:
    with pytest.raises(UserError, match=r"early_stopping\.patience"):
        TrainConfig(early_stopping=EarlyStoppingConfig(patience=-1)).validate()
    with pytest.raises(UserError, match=r"early_stopping\.min_delta"):
        TrainConfig(early_stopping=EarlyStoppingConfig(min_delta=float("nan"))).validate()


def test_a_field_younger_than_a_run_had_its_default():
    current = workdirs.plain(ExperimentConfig(data=DataConfig(mode="windows")))
    stored = json.loads(json.dumps(current))
    del stored["data"]["windows_in_a_row"]
    workdirs.check_unchanged(stored, current)
    current["data"]["windows_in_a_row"] = 2
    with pytest.raises(UserError, match=r"data\.windows_in_a_row is 2 but this run was started with 1"):
        workdirs.check_unchanged(stored, current)

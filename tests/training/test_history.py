"""Histories, epoch means and the metrics file: exact, strict JSON, and whole after a crash."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase2_jax.errors import UserError
from phase2_jax.training import json_files
from phase2_jax.training.history import HEATMAP_COLUMNS, EpochAccumulator, MetricsFile, TrainingHistory, read_metrics
from phase2_jax.training.records import DIAGNOSTIC_KEYS, PER_LAYER_KEYS, STEP_KEYS, Record, batch_tags, epoch_tags

LAYERS = 3


def step_record(step: int, seed: int = 0, **changes: object) -> Record:
    values = np.random.default_rng((seed, step)).random(100).astype(np.float32)
    numbers = iter(values.tolist())
    record: Record = {"step": step, "epoch": 1} | {key: next(numbers) for key in (*STEP_KEYS, *DIAGNOSTIC_KEYS)}
    record["per_layer"] = {key: [next(numbers) for _ in range(LAYERS)] for key in PER_LAYER_KEYS}
    return record | changes


def epoch_record(epoch: int, val_loss: float | None = 2.0, tokens: int = 8) -> Record:
    accumulator = EpochAccumulator()
    for step in range(4 * epoch - 3, 4 * epoch + 1):
        accumulator.add(step_record(step), seconds=0.5)
    heatmap = np.random.default_rng(epoch).random((LAYERS, tokens)).tolist()
    histogram = {"edges": [0.0, 0.5, 1.0], "counts": [[3, 5]] * LAYERS}
    return accumulator.result(epoch=epoch, val_loss=val_loss, gamma_histogram=histogram, gamma_heatmap=heatmap)


def test_accumulator_gives_means_last_rate_and_peak() -> None:
    accumulator = EpochAccumulator()
    accumulator.add(step_record(7, loss=1.0, learning_rate=0.1, peak_vram_mb=5.0, mfu=None), seconds=1.5)
    accumulator.add(step_record(8, loss=4.0, learning_rate=0.2, peak_vram_mb=3.0, mfu=None), seconds=2.0)
    record = accumulator.result(epoch=2, val_loss=2.5, val_accuracy=0.25)
    assert (record["train_loss"], record["val_loss"], record["val_accuracy"]) == (2.5, 2.5, 0.25)
    assert (record["epoch"], record["step"], accumulator.num_steps) == (2, 8, 2)
    assert (record["learning_rate"], record["peak_vram_mb"], record["mfu"]) == (0.2, 5.0, None)
    assert record["epoch_time"] == 3.5
    first, second = step_record(7), step_record(8)
    assert record["mean_gamma"] == (first["mean_gamma"] + second["mean_gamma"]) / 2
    expected = [(a + b) / 2 for a, b in zip(first["per_layer"]["energy"], second["per_layer"]["energy"], strict=True)]
    assert record["per_layer"]["energy"] == expected
    assert set(record["per_layer"]) == set(PER_LAYER_KEYS)


@given(split=st.integers(0, 12), losses=st.lists(st.none() | st.floats(width=32), min_size=12, max_size=12))
def test_accumulator_survives_a_checkpoint_bit_for_bit(split: int, losses: list[float | None]) -> None:
    records = [step_record(step + 1, loss=loss) for step, loss in enumerate(losses)]
    whole = EpochAccumulator()
    for record in records:
        whole.add(record, 0.1)
    parted = EpochAccumulator()
    for record in records[:split]:
        parted.add(record, 0.1)
    parted = EpochAccumulator.from_json(json.loads(json_files.dumps(parted.to_json())))
    for record in records[split:]:
        parted.add(record, 0.1)
    # repr tells -0.0, NaN and every last bit apart.
    assert repr(parted.result(epoch=1, val_loss=None)) == repr(whole.result(epoch=1, val_loss=None))
    assert json_files.dumps(parted.to_json()) == json_files.dumps(whole.to_json())


def test_one_infinite_figure_spoils_its_mean_only() -> None:
    accumulator = EpochAccumulator()
    accumulator.add(step_record(1, mean_snr=math.inf))
    accumulator.add(step_record(2, mean_snr=1.0))
    record = accumulator.result(epoch=1, val_loss=1.0)
    assert math.isnan(record["mean_snr"])
    assert math.isfinite(record["train_loss"])


def test_history_has_the_documented_names(tmp_path: Path) -> None:
    history = TrainingHistory()
    record = epoch_record(1)
    assert history.append(record)
    history.write(tmp_path)
    data = json.loads((tmp_path / "training_history.json").read_text(encoding="utf-8"))
    assert data["train_losses"] == [record["train_loss"]]
    assert data["val_losses"] == [2.0]
    assert data["val_perplexities"] == [math.exp(2.0)]
    assert data["learning_rates"] == [record["learning_rate"]]
    per_layer = record["per_layer"]
    assert data["gamma_history"] == [
        {
            "mean": record["mean_gamma"],
            "std": record["std_gamma"],
            "min": record["min_gamma"],
            "max": record["max_gamma"],
            "per_layer": per_layer["gamma_mean"],
        }
    ]
    assert data["snr_history"] == [
        {"mean": record["mean_snr"], "low_ratio": record["low_snr_ratio"], "per_layer": per_layer["snr_mean"]}
    ]
    assert data["resonance_history"] == [
        {
            "modes": record["num_resonant_modes"],
            "energy": record["total_resonance_energy"],
            "per_layer": per_layer["resonant_modes"],
        }
    ]
    assert data["stability_history"] == [
        {
            "stable_ratio": record["lyapunov_stable_ratio"],
            "energy": record["mean_fast_weight_energy"],
            "per_layer": per_layer["stable_ratio"],
        }
    ]
    assert (data["best_val_loss"], data["total_epochs"], data["steps"], data["epoch_times"]) == (2.0, 1, [4], [2.0])
    assert data["gamma_histograms"] == [{"edges": [0.0, 0.5, 1.0], "counts": [[3, 5]] * LAYERS}]
    np.testing.assert_allclose(data["gamma_heatmaps"][0]["values"], record["gamma_heatmap"], rtol=5e-4)  # 4 digits kept


def test_history_round_trips_through_file_and_checkpoint(tmp_path: Path) -> None:
    history = TrainingHistory()
    assert [history.append(epoch_record(i + 1, loss)) for i, loss in enumerate((3.0, 2.0, 2.0, math.nan, None))] == [
        True,
        True,
        False,
        False,
        False,
    ]
    history.write(tmp_path)
    assert TrainingHistory.read(tmp_path) == history
    assert TrainingHistory.from_json(json.loads(json_files.dumps(history.to_json()))) == history
    assert history.best_val_loss == 2.0
    assert history.val_losses == [3.0, 2.0, 2.0, None, None]


def test_history_of_a_hopeless_loss_is_still_strict_json(tmp_path: Path) -> None:
    history = TrainingHistory()
    history.append(epoch_record(1, 1e6))
    history.append({"step": 8, "epoch": 2, "train_loss": math.nan, "val_loss": math.inf, "mean_gamma": math.nan})
    text = history.write(tmp_path).read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["val_losses"] == [1e6, None]
    assert data["val_perplexities"] == [None, None]
    assert data["gamma_history"][1] == {"mean": None, "std": None, "min": None, "max": None, "per_layer": None}


def test_long_heatmap_is_averaged_into_columns() -> None:
    history = TrainingHistory()
    tokens = 4 * HEATMAP_COLUMNS - 3
    record = epoch_record(1, tokens=tokens)
    history.append(record)
    heatmap = history.gamma_heatmaps[0]
    assert heatmap is not None
    assert heatmap["tokens_per_column"] == 4
    values = np.array(heatmap["values"])
    assert values.shape == (LAYERS, HEATMAP_COLUMNS)
    full = np.array(record["gamma_heatmap"])
    np.testing.assert_allclose(values[:, 1], full[:, 4:8].mean(axis=1), rtol=5e-4)  # 4 digits kept
    np.testing.assert_allclose(values[:, -1], full[:, -1], rtol=5e-4)


def test_crash_while_writing_keeps_the_old_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = TrainingHistory()
    history.append(epoch_record(1))
    history.write(tmp_path)
    before = history.to_json()

    def crash(file_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    history.append(epoch_record(2))
    with pytest.raises(OSError, match="disk full"):
        history.write(tmp_path)
    assert TrainingHistory.read(tmp_path).to_json() == before


@pytest.mark.parametrize("text", ["", "[]", '{"train_losses": [1'])
def test_damaged_history_is_a_user_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"training_history\.json does not exist"):
        TrainingHistory.read(tmp_path)
    (tmp_path / "training_history.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="not a training history"):
        TrainingHistory.read(tmp_path)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_strict_json_keeps_every_finite_bit(value: object) -> None:
    plain = json_files.to_plain(value)
    again = json.loads(json_files.dumps(value), parse_constant=lambda name: pytest.fail(name))
    assert repr(again) == repr(plain)


def test_json_refuses_what_it_cannot_hold() -> None:
    assert json_files.to_plain({"a": np.float32(0.5), "b": np.arange(2), "c": (np.nan,)}) == {
        "a": 0.5,
        "b": [0, 1],
        "c": [None],
    }
    with pytest.raises(TypeError, match="object has no JSON form"):
        json_files.to_plain([object()])


def _logged(path: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_metrics(path)]


def test_metrics_file_appends_a_line_at_a_time(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write_step(step_record(1, mfu=None, grad_norm=math.nan))
    records = list(read_metrics(metrics.path))  # on disk before close
    metrics.write_epoch(epoch_record(1))
    metrics.close()
    assert records[0]["loss"] == step_record(1)["loss"]
    assert (records[0]["mfu"], records[0]["grad_norm"]) == (None, None)
    np.testing.assert_allclose(records[0]["per_layer"]["energy"], step_record(1)["per_layer"]["energy"], rtol=1e-6)
    assert _logged(metrics.path) == [("step", 1), ("epoch", 4)]
    assert not any("gamma_h" in key for key in list(read_metrics(metrics.path))[1])


def test_resumed_metrics_file_equals_one_never_interrupted(tmp_path: Path) -> None:
    def write(metrics: MetricsFile, first: int, last: int) -> None:
        for step in range(first, last + 1):
            metrics.write_step(step_record(step))
            if step % 4 == 0:
                metrics.write_epoch(epoch_record(step // 4))

    whole, killed = MetricsFile(tmp_path / "whole.jsonl"), MetricsFile(tmp_path / "killed.jsonl")
    write(whole, 1, 10)
    write(killed, 1, 9)
    killed.close()
    with killed.path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": 10, "lo')
    # The checkpoint was taken at step 8 before the epoch that ends there was counted.
    killed.truncate_after(8, epochs=1)
    assert _logged(killed.path)[-1] == ("step", 8)
    killed.write_epoch(epoch_record(2))
    write(killed, 9, 10)
    whole.close()
    killed.close()
    assert killed.path.read_bytes() == whole.path.read_bytes()
    killed.truncate_after(8)
    assert _logged(killed.path)[-1] == ("epoch", 8)
    killed.truncate_after(0)
    assert killed.path.read_bytes() == b""
    MetricsFile(tmp_path / "absent.jsonl").truncate_after(3)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(("line", "reason"), [("nonsense", "not a JSON record"), ("3", "not a JSON"), ("{}", "lacks")])
def test_damaged_metrics_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "step", "step": 1}}\n{line}\n{{"kind": "step", "step": 3}}\n', encoding="utf-8")
    with pytest.raises(UserError, match=f"line 2 .*{reason}"):
        MetricsFile(path).truncate_after(1)
    assert path.read_text(encoding="utf-8").count("\n") == 3  # nothing was lost


def test_tags_are_those_of_the_original_and_leave_out_what_is_missing() -> None:
    tags = batch_tags(step_record(1, peak_vram_mb=None, mfu=math.inf))
    original = "loss gamma_mean gamma_std gamma_min gamma_max snr_mean snr_low_ratio resonant_modes resonance_energy"
    for name in (*original.split(), "stability_ratio", "fast_weight_energy"):
        assert f"batch/{name}" in tags
    assert not {"batch/vram_mb", "batch/mfu"} & tags.keys()
    layers = {"gamma": "gamma_mean", "snr": "snr_mean", "resonance": "resonant_modes", "stability": "stable_ratio"}
    same = {key: key for key in ("energy", "energy_change", "coherence")} | {"overdamped": "overdamped_ratio"}
    for tag, key in (layers | same).items():
        assert [tags[f"{tag}/layer_{layer}"] for layer in range(LAYERS)] == step_record(1)["per_layer"][key]
    record = epoch_record(1)
    tags = epoch_tags(record)
    assert tags["val/perplexity"] == math.exp(2.0)
    assert tags["train/perplexity"] == math.exp(record["train_loss"])
    assert {"epoch", "learning_rate", "train/epoch_time", "train/gamma_mean", "train/stability_ratio"} <= tags.keys()
    assert batch_tags({"step": 1, "epoch": 1, "per_layer": None}) == {}

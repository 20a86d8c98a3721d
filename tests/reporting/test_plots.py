"""The plots of a run: drawn from its files, for short runs and missing figures too."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from phase2_jax.errors import UserError
from phase2_jax.reporting.drawing import moving_average
from phase2_jax.reporting.plots import gamma_evolution, learning_curves, write_plots
from phase2_jax.reporting.run_files import read_step_curves
from phase2_jax.training.history import EpochAccumulator, MetricsFile, TrainingHistory
from phase2_jax.training.records import Record

LAYERS, TOKENS = 3, 24


def run(workdir: Path, epochs: int, steps: int, known: bool = True) -> TrainingHistory:
    """The files of a run; with ``known`` False every figure that may be missing is."""
    history, metrics = TrainingHistory(), MetricsFile(workdir / "metrics.jsonl")
    for epoch in range(1, epochs + 1):
        accumulator = EpochAccumulator()
        for step in range((epoch - 1) * steps + 1, epoch * steps + 1):
            gamma = [0.3 / (layer + 1) + 0.001 * step for layer in range(LAYERS)]
            record: Record = {"step": step, "epoch": epoch, "learning_rate": 1e-3 / step}
            if known:
                record |= {"loss": 4.0 / step + 2.0, "mean_gamma": 0.2, "per_layer": {"gamma_mean": gamma}}
            metrics.write_step(record)
            accumulator.add(record)
        heatmap = np.geomspace(0.01, 1.0, LAYERS * TOKENS).reshape(LAYERS, TOKENS).tolist() if known else None
        record = accumulator.result(epoch=epoch, val_loss=2.5 if known else None, gamma_heatmap=heatmap)
        metrics.write_epoch(record)
        history.append(record)
    metrics.close()
    history.write(workdir)
    return history


def xs(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata(), dtype=np.float64).tolist()


def ys(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=np.float64)


def texts(figure: Figure) -> str:
    return "\n".join(item.get_text() for axes in figure.axes for item in axes.texts)


@pytest.mark.parametrize(("epochs", "steps", "known"), [(3, 30, True), (1, 1, True), (1, 2, False)])
def test_plots_are_readable_pictures(tmp_path: Path, epochs: int, steps: int, known: bool) -> None:
    run(tmp_path, epochs, steps, known)
    paths = write_plots(tmp_path)
    assert paths == [tmp_path / "plots" / name for name in ("learning_curves.png", "gamma_evolution.png")]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) >= 1000
            assert image.convert("L").getextrema() == (0, 255)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in paths)


def test_learning_curves_show_the_recorded_numbers(tmp_path: Path) -> None:
    history = run(tmp_path, 2, 40)
    figure = learning_curves(history, read_step_curves(tmp_path / "metrics.jsonl"))
    loss, ppl, rate = figure.axes
    each, average, train, val = loss.get_lines()
    np.testing.assert_allclose(ys(each), 4.0 / np.arange(1, 81) + 2.0, rtol=1e-12)
    np.testing.assert_allclose(ys(average), moving_average(ys(each), 8), rtol=1e-12)
    assert xs(train) == [20.5, 60.5]  # means of steps 1 to 40 and 41 to 80
    assert xs(val) == [40, 80]
    np.testing.assert_allclose(ys(ppl.get_lines()[1]), np.exp(2.5), rtol=1e-12)
    np.testing.assert_allclose(ys(rate.get_lines()[0]), 1e-3 / np.arange(1, 81), rtol=1e-12)
    assert "nats per token" in loss.get_ylabel()
    assert rate.get_xlabel() == "step"
    assert ppl.get_yscale() == "log"


def test_gamma_evolution_shows_lines_and_both_heat_maps(tmp_path: Path) -> None:
    history = run(tmp_path, 2, 150)
    curves = read_step_curves(tmp_path / "metrics.jsonl")
    lines, over_time, over_tokens = gamma_evolution(history, curves).axes[:3]
    assert len(lines.get_lines()) == LAYERS
    np.testing.assert_allclose(ys(lines.get_lines()[1]), 0.15 + 0.001 * np.arange(1, 301), rtol=1e-6)
    time_map = over_time.collections[0].get_array()
    assert time_map is not None
    assert time_map.shape == (LAYERS, 200)
    assert over_time.get_xlim() == (0.0, 300.0)
    assert over_time.yaxis_inverted()  # layer 0 on top
    token_map = over_tokens.collections[0].get_array()
    assert token_map is not None
    expected = np.geomspace(0.01, 1.0, LAYERS * TOKENS).reshape(LAYERS, TOKENS)
    np.testing.assert_allclose(token_map, expected, rtol=5e-4)  # the history keeps 4 digits


def test_half_life_axis_reads_the_same_curve(tmp_path: Path) -> None:
    history = run(tmp_path, 1, 10)
    figure = gamma_evolution(history, read_step_curves(tmp_path / "metrics.jsonl"))
    (half_life,) = [axes for axes in figure.axes if "half-life" in axes.get_ylabel()]
    low, high = figure.axes[0].get_ylim()
    np.testing.assert_allclose(half_life.get_ylim(), (np.log(2) / low, np.log(2) / high))


def test_without_metrics_file_the_epochs_are_drawn(tmp_path: Path) -> None:
    history = run(tmp_path, 3, 5)
    (tmp_path / "metrics.jsonl").unlink()
    curves = read_step_curves(tmp_path / "metrics.jsonl")
    assert xs(gamma_evolution(history, curves).axes[0].get_lines()[0]) == [5, 10, 15]
    assert xs(learning_curves(history, curves).axes[2].get_lines()[0]) == [5, 10, 15]


def test_missing_figures_are_said_to_be_missing(tmp_path: Path) -> None:
    history = run(tmp_path, 1, 2, known=False)
    curves = read_step_curves(tmp_path / "metrics.jsonl")
    assert texts(gamma_evolution(history, curves)).count("not recorded") == 3
    assert texts(learning_curves(history, curves)).count("not recorded") == 2
    assert "not recorded" not in texts(learning_curves(run(tmp_path, 1, 2), curves))


def test_moving_average_is_centred_and_ignores_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 6.0, 8.0])
    np.testing.assert_array_equal(moving_average(values, 3), [1.5, 1.5, 4.0, 7.0, 7.0])
    np.testing.assert_array_equal(moving_average(np.array([np.nan, np.nan]), 2), [np.nan, np.nan])
    assert moving_average(np.empty(0), 1).shape == (0,)


def test_run_without_history_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one epoch"):
        write_plots(tmp_path)
    (tmp_path / "training_history.json").write_text(json.dumps(TrainingHistory().to_json()), encoding="utf-8")
    assert len(write_plots(tmp_path)) == 2  # an empty history gives empty pictures, not a crash


@pytest.mark.parametrize(("rate", "said"), [(0.0, True), (0.25, False)])
def test_constant_rates_and_none_at_all(tmp_path: Path, rate: float, said: bool) -> None:
    history = run(tmp_path, 2, 5)
    curves = read_step_curves(tmp_path / "metrics.jsonl")
    constant = replace(curves, layers={"gamma_mean": np.full((10, LAYERS), rate)})
    lines = gamma_evolution(history, constant).axes[0]
    assert any(text.get_text() == "not recorded" for text in lines.texts) == said

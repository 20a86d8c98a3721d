"""Learning curves and the evolution of the forgetting rate Γ, drawn from the histories of a run."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phase2_jax.reporting.drawing import (
    BLUE,
    GREEN,
    VERMILION,
    floats,
    half_life_axis,
    heatmap,
    layer_lines,
    log_axis,
    moving_average,
    save,
    say_not_recorded,
    shown,
    table,
)
from phase2_jax.reporting.run_files import StepCurves, read_step_curves
from phase2_jax.training.history import METRICS_FILE, TrainingHistory
from phase2_jax.training.lr_finder import RangeTest
from phase2_jax.training.workdir import PLOTS


def write_plots(workdir: Path) -> list[Path]:
    """Draw ``learning_curves.png`` and ``gamma_evolution.png`` into ``workdir/plots`` and return their paths.

    Reads ``training_history.json`` and, where it exists, ``metrics.jsonl``; missing figures leave gaps.

    Raises:
        UserError: no history in ``workdir``, or a damaged one.
    """
    history = TrainingHistory.read(workdir)
    curves = read_step_curves(workdir / METRICS_FILE)
    folder = workdir / PLOTS
    folder.mkdir(exist_ok=True)
    return [
        save(learning_curves(history, curves), folder / "learning_curves.png"),
        save(gamma_evolution(history, curves), folder / "gamma_evolution.png"),
    ]


def learning_curves(history: TrainingHistory, curves: StepCurves) -> Figure:
    """Loss of every step with its moving average, losses and perplexities of the epochs, learning rate."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    loss, ppl, rate = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1.3, 1))
    figure.suptitle("Learning curves")
    losses_S = curves.figure("loss")
    ends = np.array(history.steps, dtype=np.float64)
    # A mean over an epoch belongs to its middle: drawn at its end, training would seem to lag behind validation.
    middles = ends - 0.5 * (np.diff(ends, prepend=0.0) - 1.0)
    window = max(1, min(50, losses_S.size // 10))
    faint = 0.3 if window > 1 else 1.0
    loss.plot(curves.steps, losses_S, color=BLUE, alpha=faint, linewidth=0.8, label="training, each step")
    if window > 1:
        average = moving_average(losses_S, window)
        loss.plot(curves.steps, average, color=BLUE, linewidth=1.8, label=f"training, mean of {window} steps")
    for axes, train, val in (
        (loss, history.train_losses, history.val_losses),
        (ppl, history.train_perplexities, history.val_perplexities),
    ):
        axes.plot(middles, floats(train), "s-", color=GREEN, markersize=5, linewidth=1, label="training, epoch mean")
        best = min((value for value in val if value is not None), default=math.nan)
        label = f"validation (best {best:.4g})"
        axes.plot(ends, floats(val), "o-", color=VERMILION, markersize=5, linewidth=1.2, label=label)
    if curves.steps.size:
        rate.plot(curves.steps, curves.figure("learning_rate"), color=BLUE)
    else:
        rate.plot(ends, floats(history.learning_rates), "s-", color=BLUE, markersize=5)
    loss.set(title="Loss", ylabel="loss (nats per token)")
    ppl.set(title="Perplexity", ylabel="perplexity (log scale)")
    rate.set(title="Learning rate", ylabel="learning rate", xlabel="step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, ppl, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not shown(axes).size:
            say_not_recorded(axes)
        elif axes is not rate:
            axes.legend(fontsize=8)
    log_axis(ppl)
    return figure


def gamma_evolution(history: TrainingHistory, curves: StepCurves) -> Figure:
    """Γ of each layer over the steps, the same as a heat map, and the Γ of every token of the last validation batch."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    lines, over_time, over_tokens = figure.subplots(3, 1, height_ratios=(2, 1.2, 1.2))
    figure.suptitle("Evolution of the forgetting rate Γ")
    step_S, gamma_SxL = _gamma_over_steps(history, curves)
    # Architectures without a forgetting rate report zeros.
    gamma_SxL = np.where(gamma_SxL > 0, gamma_SxL, np.nan)
    layer_lines(lines, step_S, gamma_SxL)
    if shown(lines).size:
        log_axis(lines)
        half_life_axis(lines)
    lines.set(title="Mean Γ of each layer", xlabel="step", ylabel="Γ (log scale)")
    columns_SxL, edges = _binned(step_S, gamma_SxL)
    heatmap(over_time, columns_SxL.T, edges)
    over_time.set(title="Mean Γ, layer by step", xlabel="step", ylabel="layer")
    last = next((item for item in reversed(history.gamma_heatmaps) if item), None)
    values_LxM = table(last["values"], len(last["values"][0])) if last else np.empty((0, 0))
    width = last["tokens_per_column"] if last else 1
    heatmap(over_tokens, values_LxM, np.arange(values_LxM.shape[1] + 1) * width)
    over_tokens.set(title="Γ, layer by token: one validation sequence, last epoch", xlabel="token", ylabel="layer")
    return figure


def learning_rate_test(test: RangeTest) -> Figure:
    """Loss over the learning rate, with the suggestion where it falls fastest."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color=BLUE, alpha=0.35, linewidth=0.9, label="each step")
    axes.plot(test.rates, test.smoothed, color=BLUE, linewidth=1.8, label="smoothed")
    axes.axvline(
        test.suggestion, color=VERMILION, linestyle="--", label=f"suggestion {test.suggestion:g}: steepest fall"
    )
    axes.set_xscale("log")
    # The loss explodes at the end: what matters lies below its start.
    top = float(np.max(test.smoothed[: max(1, test.smoothed.size // 4)]))
    low = float(np.min(test.losses))
    axes.set_ylim(low - 0.1 * (top - low), top + 0.5 * (top - low) + 1e-3)
    axes.set(title="Learning-rate range test", xlabel="learning rate (log scale)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _gamma_over_steps(history: TrainingHistory, curves: StepCurves) -> tuple[np.ndarray, np.ndarray]:
    """Per-step Γ, or the epochs' means when the metrics file does not have it."""
    gamma_SxL = curves.layer("gamma_mean")
    if np.isfinite(gamma_SxL).any():
        return curves.steps, gamma_SxL
    layers = [entry.get("per_layer") or [] for entry in history.gamma_history]
    return np.array(history.steps, dtype=np.int64), table(layers, max(map(len, layers), default=0))


def _binned(step_S: np.ndarray, gamma_SxL: np.ndarray, bins: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """At most ``bins`` columns of mean Γ and the steps at which they begin and end."""
    if step_S.size == 0:
        return gamma_SxL, np.zeros(1)
    groups = np.array_split(np.arange(step_S.size), min(bins, step_S.size))
    valid_SxL = np.isfinite(gamma_SxL)
    filled_SxL = np.where(valid_SxL, gamma_SxL, 0.0)
    sums = np.array([filled_SxL[group].sum(axis=0) for group in groups])
    counts = np.array([valid_SxL[group].sum(axis=0) for group in groups])
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    ends = [float(step_S[group[-1]]) for group in groups]
    return means, np.array([float(step_S[0]) - 1.0, *ends])

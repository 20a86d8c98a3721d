"""Learning curves and the evolution of the forgetting rate Γ, drawn from the files of a run.

Figures are made without pyplot: nothing global changes, and no display is needed. Layers have an order and take the
colours of viridis; everything else uses the Okabe-Ito colours, which colour-blind readers can tell apart.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from phase2_jax.training.history import METRICS_FILE, TrainingHistory, read_metrics

BLUE, GREEN, VERMILION = "#0072B2", "#009E73", "#D55E00"
_DPI = 150


@dataclass(frozen=True)
class StepCurves:
    """Figures of every step, NaN where one was not available: arrays of S steps, ``layer_gammas`` S x L."""

    steps: np.ndarray
    losses: np.ndarray
    learning_rates: np.ndarray
    layer_gammas: np.ndarray


def write_plots(workdir: Path) -> list[Path]:
    """Draw ``learning_curves.png`` and ``gamma_evolution.png`` into ``workdir/plots`` and return their paths.

    Reads ``training_history.json`` and, where it exists, ``metrics.jsonl``; missing figures leave gaps.

    Raises:
        UserError: no history in ``workdir``, or a damaged one.
    """
    history = TrainingHistory.read(workdir)
    curves = read_step_curves(workdir / METRICS_FILE)
    folder = workdir / "plots"
    folder.mkdir(exist_ok=True)
    return [
        _save(learning_curves(history, curves), folder / "learning_curves.png"),
        _save(gamma_evolution(history, curves), folder / "gamma_evolution.png"),
    ]


def read_step_curves(path: Path) -> StepCurves:
    """Per-step figures of a metrics file; empty arrays if there is no such file."""
    records = [record for record in read_metrics(path) if record["kind"] == "step"] if path.exists() else []
    layers = [(record.get("per_layer") or {}).get("gamma_mean") or [] for record in records]
    num_layers = max((len(values) for values in layers), default=0)
    return StepCurves(
        steps=np.array([record["step"] for record in records], dtype=np.int64),
        losses=_floats([record.get("loss") for record in records]),
        learning_rates=_floats([record.get("learning_rate") for record in records]),
        layer_gammas=_table(layers, num_layers),
    )


def learning_curves(history: TrainingHistory, curves: StepCurves) -> Figure:
    """Loss of every step with its moving average, losses and perplexities of the epochs, learning rate."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    loss, ppl, rate = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1.3, 1))
    figure.suptitle("Learning curves")
    ends = np.array(history.steps, dtype=np.float64)
    # A mean over an epoch belongs to its middle: drawn at its end, training would seem to lag behind validation.
    middles = ends - 0.5 * (np.diff(ends, prepend=0.0) - 1.0)
    window = max(1, min(50, curves.losses.size // 10))
    faint = 0.3 if window > 1 else 1.0
    loss.plot(curves.steps, curves.losses, color=BLUE, alpha=faint, linewidth=0.8, label="training, each step")
    if window > 1:
        average = moving_average(curves.losses, window)
        loss.plot(curves.steps, average, color=BLUE, linewidth=1.8, label=f"training, mean of {window} steps")
    for axes, train, val in (
        (loss, history.train_losses, history.val_losses),
        (ppl, history.train_perplexities, history.val_perplexities),
    ):
        axes.plot(middles, _floats(train), "s-", color=GREEN, markersize=5, linewidth=1, label="training, epoch mean")
        best = min((value for value in val if value is not None), default=math.nan)
        label = f"validation (best {best:.4g})"
        axes.plot(ends, _floats(val), "o-", color=VERMILION, markersize=5, linewidth=1.2, label=label)
    if curves.steps.size:
        rate.plot(curves.steps, curves.learning_rates, color=BLUE)
    else:
        rate.plot(ends, _floats(history.learning_rates), "s-", color=BLUE, markersize=5)
    loss.set(title="Loss", ylabel="loss (nats per token)")
    ppl.set(title="Perplexity", ylabel="perplexity (log scale)")
    rate.set(title="Learning rate", ylabel="learning rate", xlabel="step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (loss, ppl, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not _shown(axes).size:
            _say_not_recorded(axes)
        elif axes is not rate:
            axes.legend(fontsize=8)
    _log_axis(ppl)
    return figure


def gamma_evolution(history: TrainingHistory, curves: StepCurves) -> Figure:
    """Γ of each layer over the steps, the same as a heat map, and the Γ of every token of the last validation batch."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    lines, over_time, over_tokens = figure.subplots(3, 1, height_ratios=(2, 1.2, 1.2))
    figure.suptitle("Evolution of the forgetting rate Γ")
    step_S, gamma_SxL = _gamma_over_steps(history, curves)
    _layer_lines(lines, step_S, gamma_SxL)
    lines.set(title="Mean Γ of each layer", xlabel="step", ylabel="Γ (log scale)")
    columns_SxL, edges = _binned(step_S, gamma_SxL)
    _heatmap(over_time, columns_SxL.T, edges)
    over_time.set(title="Mean Γ, layer by step", xlabel="step", ylabel="layer")
    heatmap = next((item for item in reversed(history.gamma_heatmaps) if item), None)
    values_LxM = _table(heatmap["values"], len(heatmap["values"][0])) if heatmap else np.empty((0, 0))
    width = heatmap["tokens_per_column"] if heatmap else 1
    _heatmap(over_tokens, values_LxM, np.arange(values_LxM.shape[1] + 1) * width)
    over_tokens.set(title="Γ, layer by token: one validation sequence, last epoch", xlabel="token", ylabel="layer")
    return figure


def moving_average(values_S: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` values around each position; NaNs, and what lies beyond the ends, do not count."""
    valid_S = np.isfinite(values_S)
    sums = np.cumsum(np.append(0.0, np.where(valid_S, values_S, 0.0)))
    counts = np.cumsum(np.append(0, valid_S))
    first = np.maximum(np.arange(values_S.size) - (window - 1) // 2, 0)
    last = np.minimum(np.arange(values_S.size) + window // 2 + 1, values_S.size)
    counts_S = counts[last] - counts[first]
    return np.where(counts_S > 0, (sums[last] - sums[first]) / np.maximum(counts_S, 1), np.nan)


def _gamma_over_steps(history: TrainingHistory, curves: StepCurves) -> tuple[np.ndarray, np.ndarray]:
    """Per-step Γ, or the epochs' means when the metrics file does not have it."""
    if np.isfinite(curves.layer_gammas).any():
        return curves.steps, curves.layer_gammas
    layers = [entry.get("per_layer") or [] for entry in history.gamma_history]
    return np.array(history.steps, dtype=np.int64), _table(layers, max(map(len, layers), default=0))


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


def _layer_lines(axes: Axes, step_S: np.ndarray, gamma_SxL: np.ndarray) -> None:
    num_layers = gamma_SxL.shape[1]
    labelled_every = math.ceil(num_layers / 16)
    for layer in range(num_layers):
        colour = mpl.colormaps["viridis"](0.9 * layer / max(num_layers - 1, 1))
        marker = "o" if step_S.size < 20 else None
        label = f"layer {layer}" if layer % labelled_every == 0 else None
        axes.plot(step_S, gamma_SxL[:, layer], color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    if not _shown(axes).size:
        _say_not_recorded(axes)
        return
    axes.legend(fontsize=8, frameon=False, ncols=min(num_layers, 8), loc="upper center", bbox_to_anchor=(0.5, -0.11))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _log_axis(axes)
    _half_life_axis(axes)


def _heatmap(axes: Axes, values_LxM: np.ndarray, edges: np.ndarray) -> None:
    """Draw Γ with a row a layer, layer 0 on top, on a log scale; grey where it was not recorded."""
    valid = values_LxM[np.isfinite(values_LxM) & (values_LxM > 0)]
    if valid.size == 0:
        _say_not_recorded(axes)
        return
    low, high = float(valid.min()), float(valid.max())
    high = max(high, 1.01 * low)
    rows = np.arange(values_LxM.shape[0] + 1) - 0.5
    shown = np.ma.masked_invalid(np.where(values_LxM > 0, values_LxM, np.nan))
    axes.set_facecolor("lightgrey")
    mesh = axes.pcolormesh(edges, rows, shown, cmap="viridis", norm=LogNorm(low, high), rasterized=True)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.02, 0.0, 0.02, 1.0)), label="Γ (log scale)")
    _log_ticks(bar.ax, low, high)


def _say_not_recorded(axes: Axes) -> None:
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)


def _shown(axes: Axes) -> np.ndarray:
    """All finite y values drawn as lines."""
    values = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    flat = np.concatenate(values) if values else np.empty(0)
    return flat[np.isfinite(flat)]


def _log_axis(axes: Axes) -> None:
    positive = _shown(axes)[_shown(axes) > 0]
    if positive.size:
        axes.set_yscale("log")
        _log_ticks(axes, *axes.get_ylim())


def _log_ticks(axes: Axes, low: float, high: float) -> None:
    """Plain numbers on a logarithmic y axis, dense enough to read and never crowded."""
    axes.yaxis.set_major_locator(MaxNLocator(6) if high < 5.0 * low else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _half_life_axis(axes: Axes) -> None:
    """The same curves read as half-lives ln 2 / Γ, on the right."""
    low, high = axes.get_ylim()
    other = axes.twinx()
    other.set_yscale("log")
    other.set_ylim(math.log(2.0) / low, math.log(2.0) / high)
    other.set_ylabel("half-life at dt = 1 (tokens)")
    _log_ticks(other, math.log(2.0) / high, math.log(2.0) / low)


def _floats(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _table(rows: Sequence[Sequence[float | None]], width: int) -> np.ndarray:
    """Rows of numbers as an array, NaN for None and for what a short row lacks."""
    table = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = _floats(row)
    return table


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=_DPI, format="png")
    os.replace(temporary, path)
    return path

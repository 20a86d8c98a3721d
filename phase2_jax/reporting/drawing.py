"""What the figures of a report share: colours, axes that say what they show, and how a figure becomes a file.

Figures are made without pyplot: nothing global changes, and no display is needed. Layers have an order and take the
colours of viridis; everything else uses the Okabe-Ito colours, which colour-blind readers can tell apart.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

BLUE, GREEN, VERMILION, ORANGE, SKY, PURPLE, BLACK = (
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#E69F00",
    "#56B4E9",
    "#CC79A7",
    "#000000",
)
RUN_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
_DPI = 150


def moving_average(values_S: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` values around each position; NaNs, and what lies beyond the ends, do not count."""
    valid_S = np.isfinite(values_S)
    sums = np.cumsum(np.append(0.0, np.where(valid_S, values_S, 0.0)))
    counts = np.cumsum(np.append(0, valid_S))
    first = np.maximum(np.arange(values_S.size) - (window - 1) // 2, 0)
    last = np.minimum(np.arange(values_S.size) + window // 2 + 1, values_S.size)
    counts_S = counts[last] - counts[first]
    return np.where(counts_S > 0, (sums[last] - sums[first]) / np.maximum(counts_S, 1), np.nan)


def smoothing_window(num_steps: int) -> int:
    """Steps that a moving average spans: a twentieth of the run, at most 50."""
    return max(1, min(50, num_steps // 20))


def layer_lines(axes: Axes, step_S: np.ndarray, values_SxL: np.ndarray, window: int = 1) -> None:
    """A line a layer, layer 0 darkest, each the moving average of ``window`` steps; the legend is below the axes."""
    num_layers = values_SxL.shape[1]
    labelled_every = math.ceil(num_layers / 16)
    for layer in range(num_layers):
        marker = "o" if step_S.size < 20 else None
        label = f"layer {layer}" if layer % labelled_every == 0 else None
        values_S = moving_average(values_SxL[:, layer], window)
        colour = layer_colour(layer, num_layers)
        axes.plot(step_S, values_S, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    if not shown(axes).size:
        say_not_recorded(axes)
        return
    axes.legend(fontsize=8, frameon=False, ncols=min(num_layers, 8), loc="upper center", bbox_to_anchor=(0.5, -0.11))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def shared_legend(figure: Figure, axes: Axes) -> None:
    """One legend for all axes of a figure, those of `axes`, below them."""
    for each in figure.axes:
        legend = each.get_legend()
        if legend is not None:
            legend.remove()
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, handlelength=3.5
        )


def layer_colour(layer: int, num_layers: int) -> tuple[float, float, float, float]:
    """The colour of a layer in every figure."""
    return mpl.colormaps["viridis"](0.9 * layer / max(num_layers - 1, 1))


def heatmap(axes: Axes, values_LxM: np.ndarray, edges: np.ndarray) -> None:
    """Draw Γ with a row a layer, layer 0 on top, on a log scale; grey where it was not recorded."""
    valid = values_LxM[np.isfinite(values_LxM) & (values_LxM > 0)]
    if valid.size == 0:
        say_not_recorded(axes)
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
    log_ticks(bar.ax, low, high)


def say_not_recorded(axes: Axes) -> None:
    """Leave the axes empty but for the words that explain it."""
    axes.set_yticks([])
    axes.tick_params(bottom=False, labelbottom=False)
    axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)


def shown(axes: Axes) -> np.ndarray:
    """All finite y values drawn as lines."""
    values = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    flat = np.concatenate(values) if values else np.empty(0)
    return flat[np.isfinite(flat)]


def log_axis(axes: Axes) -> None:
    """Logarithmic y axis with plain numbers, if anything positive is drawn."""
    positive = shown(axes)[shown(axes) > 0]
    if positive.size:
        axes.set_yscale("log")
        if np.ptp(positive) <= 1e-6 * positive.max():
            axes.set_ylim(positive.min() / 1.1, positive.max() * 1.1)
        log_ticks(axes, *axes.get_ylim())


def log_ticks(axes: Axes, low: float, high: float) -> None:
    """Plain numbers on a logarithmic y axis, dense enough to read and never crowded."""
    axes.yaxis.set_major_locator(MaxNLocator(6) if high < 5.0 * low else LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def half_life_axis(axes: Axes) -> None:
    """The same curves read as half-lives ln 2 / Γ, on the right."""
    low, high = axes.get_ylim()
    other = axes.twinx()
    other.set_yscale("log")
    other.set_ylim(math.log(2.0) / low, math.log(2.0) / high)
    other.set_ylabel("half-life at dt = 1 (tokens)")
    log_ticks(other, math.log(2.0) / high, math.log(2.0) / low)


def half_life_ticks(axes: Axes) -> None:
    """Logarithmic x axis with plain numbers of tokens."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def floats(values: Sequence[float | None]) -> np.ndarray:
    """Numbers as an array, NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def table(rows: Sequence[Sequence[float | None]], width: int) -> np.ndarray:
    """Rows of numbers as an array, NaN for None and for what a short row lacks."""
    table = np.full((len(rows), width), np.nan)
    for index, row in enumerate(rows):
        table[index, : len(row)] = floats(row)
    return table


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG that is either old or new, never half written."""
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=_DPI, format="png")
    os.replace(temporary, path)
    return path

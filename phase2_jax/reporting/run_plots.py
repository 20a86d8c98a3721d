"""How the optimisation went, and several runs beside each other."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phase2_jax.reporting.drawing import (
    BLUE,
    RUN_COLOURS,
    floats,
    log_axis,
    moving_average,
    say_not_recorded,
    shared_legend,
    shown,
    smoothing_window,
)
from phase2_jax.reporting.run_files import RunFiles

_LINES = ("-", "--", "-.", ":")
Curve = tuple[np.ndarray, np.ndarray]


def optimisation(run: RunFiles) -> Figure:
    """Learning rate, gradient norm, throughput, and the device's memory where it is known."""
    memory_S = run.curves.figure("peak_vram_mb")
    known = bool(np.isfinite(memory_S).any())
    figure = Figure(figsize=(9, 11 if known else 8.5), layout="constrained")
    rate, norm, speed, *rest = figure.subplots(4 if known else 3, 1, sharex=True)
    figure.suptitle("Optimisation")
    steps = run.curves.steps
    window = smoothing_window(steps.size)
    if steps.size:
        rate.plot(steps, run.curves.figure("learning_rate"), color=BLUE)
    else:
        rate.plot(run.history.steps, floats(run.history.learning_rates), "s-", color=BLUE)
    rate.set(title="Learning rate", ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _noisy(norm, steps, run.curves.figure("grad_norm"), window)
    if run.config is not None and run.config.optimizer.gradient_clip_norm and shown(norm).size:
        clip = run.config.optimizer.gradient_clip_norm
        norm.axhline(clip, color=RUN_COLOURS[1], linestyle="--", label=f"clipped to {clip:g}")
    log_axis(norm)
    norm.set(title="Gradient norm before clipping", ylabel="norm (log scale)")
    _throughput(speed, run, window)
    for axes in rest:
        axes.plot(steps, memory_S, color=BLUE)
        axes.set(title="Peak memory of the device", ylabel="MiB")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if not shown(axes).size:
            say_not_recorded(axes)
        elif axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.axes[-1].set_xlabel("step")
    return figure


def _noisy(axes: Axes, steps: np.ndarray, values_S: np.ndarray, window: int) -> None:
    if window == 1:
        axes.plot(steps, values_S, color=BLUE, label="each step")
        return
    axes.plot(steps, values_S, color=BLUE, alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, moving_average(values_S, window), color=BLUE, linewidth=1.8, label=f"mean of {window} steps")


def _throughput(axes: Axes, run: RunFiles, window: int) -> None:
    """Rates are averaged as times: a step that was seen late makes the next look short, which is no speed."""
    rates_S = run.curves.figure("tokens_per_second")
    _noisy(axes, run.curves.steps, rates_S, window)
    axes.set(title="Throughput", ylabel="tokens per second")
    if shown(axes).size:
        axes.get_lines()[-1].set_ydata(_mean_rate(rates_S, window))
        axes.set_ylim(0.0, 1.3 * float(np.nanquantile(rates_S, 0.98)))


def _mean_rate(rates_S: np.ndarray, window: int) -> np.ndarray:
    return 1.0 / moving_average(1.0 / rates_S, window)


def _mean_throughput(run: RunFiles, window: int) -> Curve:
    return run.curves.steps, _mean_rate(run.curves.figure("tokens_per_second"), window)


def _step_curve(name: str, scale: float = 1.0) -> Callable[[RunFiles, int], Curve]:
    def curve(run: RunFiles, window: int) -> Curve:
        return run.curves.steps, scale * moving_average(run.curves.figure(name), window)

    return curve


def _validation(run: RunFiles, window: int) -> Curve:
    del window
    return np.asarray(run.history.steps), floats(run.history.val_losses)


_COMPARED: tuple[tuple[str, str, bool, Callable[[RunFiles, int], Curve]], ...] = (
    ("Validation loss", "nats per token", False, _validation),
    ("Training loss", "nats per token", False, _step_curve("loss")),
    ("Mean forgetting rate Γ", "Γ (log scale)", True, _step_curve("mean_gamma")),
    ("SNR", "mean |W| / σ", False, _step_curve("mean_snr")),
    ("Energy of the memory", "‖W‖² (log scale)", True, _step_curve("mean_fast_weight_energy")),
    ("Lyapunov-stable heads", "share (%)", False, _step_curve("lyapunov_stable_ratio", 100.0)),
    ("Gradient norm", "norm (log scale)", True, _step_curve("grad_norm")),
    ("Throughput", "tokens per second", False, _mean_throughput),
)


def comparison(runs: list[RunFiles]) -> Figure:
    """The main figures of several runs, a colour and a kind of line each; noisy ones as moving averages."""
    figure = Figure(figsize=(11, 14), layout="constrained")
    # One window for all: a longer one would seem to begin lower.
    window = min((smoothing_window(run.curves.steps.size) for run in runs if run.curves.steps.size), default=1)
    said = f" (per-step figures: moving averages of {window} steps)" if window > 1 else ""
    figure.suptitle(f"Runs compared{said}")
    grid = figure.subplots(4, 2)
    for axes, (title, unit, logarithmic, curve) in zip(grid.flat, _COMPARED, strict=True):
        for index, run in enumerate(runs):
            colour, kind = RUN_COLOURS[index % len(RUN_COLOURS)], _LINES[index % len(_LINES)]
            steps, values = curve(run, window)
            marker = "o" if steps.size < 20 else None
            axes.plot(steps, values, kind, color=colour, marker=marker, markersize=4, label=run.name)
        axes.set(title=title, ylabel=unit, xlabel="step")
        if not shown(axes).size:
            say_not_recorded(axes)
            continue
        if logarithmic:
            log_axis(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    shared_legend(figure, grid.flat[0])
    return figure

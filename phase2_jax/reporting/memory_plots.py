"""What the memory does: half-lives of the heads, SNR selection, resonance, energy and stability.

Curves come from the histories, spectra and masks from an `Inspection` of a checkpoint; without one those axes say so.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from phase2_jax.reporting.drawing import (
    BLACK,
    ORANGE,
    VERMILION,
    half_life_ticks,
    layer_colour,
    layer_lines,
    log_axis,
    say_not_recorded,
    shared_legend,
    shown,
    smoothing_window,
    table,
)
from phase2_jax.reporting.inspection import Inspection, half_lives
from phase2_jax.reporting.run_files import RunFiles

_QUANTILES = (0.1, 0.5, 0.9)


def half_life_spectrum(run: RunFiles, inspection: Inspection | None) -> Figure:
    """Half-life ln2 / (Γ dt) of every head, and how the half-lives of all tokens and heads of a layer are spread."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    heads, spread = figure.subplots(2, 1, sharex=True, height_ratios=(1.4, 1))
    figure.suptitle("Half-life spectrum of the heads: ln 2 / (Γ·dt)")
    heads.set(title="Each head: median of its tokens, line from the 10 % to the 90 % quantile", ylabel="layer")
    spread.set(title="Share of tokens and heads", xlabel="half-life (tokens, log scale)", ylabel="density per decade")
    if inspection is None:
        say_not_recorded(heads)
        _histogram_of_history(spread, run)
        return figure
    lives_LxTxP = half_lives(inspection.gamma_LxTxP, inspection.dt)
    num_layers, _, num_heads = lives_LxTxP.shape
    low_LxP, middle_LxP, high_LxP = np.quantile(lives_LxTxP, _QUANTILES, axis=1)
    edges = np.geomspace(0.9 * lives_LxTxP.min(), 1.1 * lives_LxTxP.max(), 41)
    for layer in range(num_layers):
        colour = layer_colour(layer, num_layers)
        order = np.argsort(middle_LxP[layer])
        y = layer + 0.7 * (np.arange(num_heads) + 0.5) / num_heads - 0.35
        heads.hlines(y, low_LxP[layer, order], high_LxP[layer, order], color=colour, linewidth=1.5)
        heads.plot(middle_LxP[layer, order], y, "o", color=colour, markersize=4)
        counts, _ = np.histogram(lives_LxTxP[layer], edges)
        density = counts / counts.sum() / np.diff(np.log10(edges))
        spread.stairs(density, edges, color=colour, linewidth=1.4, label=f"layer {layer}" if num_layers <= 16 else None)
    heads.invert_yaxis()
    heads.yaxis.set_major_locator(MaxNLocator(integer=True))
    if run.config is not None:
        longest = math.log(2.0) / (run.config.model.base_decay * inspection.dt)
        if longest < 3.0 * edges[-1]:
            heads.axvline(longest, color=VERMILION, linestyle="--", linewidth=1.2)
            place = {"transform": heads.get_xaxis_transform(), "rotation": 90, "ha": "right", "va": "center"}
            heads.text(longest, 0.5, "cap set by base_decay ", color=VERMILION, fontsize=8, **place)
    spread.legend(fontsize=8, ncols=2)
    half_life_ticks(spread)
    for axes in (heads, spread):
        axes.grid(alpha=0.3)
    return figure


def _histogram_of_history(axes: Axes, run: RunFiles) -> None:
    """Half-lives from the last epoch's Γ histograms, when there is no checkpoint to look into."""
    histogram = next((item for item in reversed(run.history.gamma_histograms) if item), None)
    if histogram is None:
        say_not_recorded(axes)
        return
    edges = half_lives(np.asarray(histogram["edges"]), 1.0 if run.config is None else run.config.model.dt)[::-1]
    for layer, counts in enumerate(histogram["counts"]):
        share = np.asarray(counts, np.float64)[::-1] / max(sum(counts), 1)
        axes.stairs(
            share / np.diff(np.log10(edges)),
            edges,
            color=layer_colour(layer, len(histogram["counts"])),
            label=f"layer {layer}",
        )
    half_life_ticks(axes)
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)


def key_directions(run: RunFiles, inspection: Inspection | None) -> Figure:
    """In how many directions the keys and the queries of every head vary, beside how many there are."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    figure.suptitle("Directions that keys and queries use: (Σσ²)² / Σσ⁴ of their singular values")
    axes.set(title="Each head, in the order of its keys; 1: all tokens ask and answer to the same key")
    axes.set(xlabel="directions (log scale)", ylabel="layer")
    if inspection is None:
        say_not_recorded(axes)
        return figure
    num_layers, num_heads = inspection.key_directions_LxH.shape
    for layer, keys_H in enumerate(inspection.key_directions_LxH):
        order = np.argsort(keys_H)
        y = layer + 0.7 * (np.arange(num_heads) + 0.5) / num_heads - 0.35
        colour = layer_colour(layer, num_layers)
        queries_H = inspection.query_directions_LxH[layer, order]
        axes.plot(keys_H[order], y, "o", color=colour, markersize=5, label=None if layer else "keys")
        axes.plot(queries_H, y, "o", color=colour, mfc="none", markersize=5, label=None if layer else "queries")
    width = inspection.energies_LxHxK.shape[-1]
    axes.axvline(width, color=VERMILION, linestyle="--", linewidth=1.2, label=f"K = {width}")
    axes.set(xscale="log", xlim=(0.9, 1.2 * width))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def snr_selection(run: RunFiles, inspection: Inspection | None) -> Figure:
    """|W| / σ over the steps with the threshold, the share below it, and its distribution in the memory now."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    mean, low, spread = figure.subplots(3, 1, height_ratios=(1.3, 1, 1.2))
    figure.suptitle("SNR of the fast weights: |W| / σ")
    steps, snr_SxL = _over_steps(run, "snr_mean", "snr_history")
    threshold = None if run.config is None else run.config.model.snr.threshold
    window = smoothing_window(steps.size)
    layer_lines(mean, steps, snr_SxL, window)
    if shown(mean).size:
        lines_LxS = np.array([line.get_ydata() for line in mean.get_lines()], np.float64)
        band = {"color": BLACK, "alpha": 0.12, "linewidth": 0}
        mean.fill_between(steps, lines_LxS.min(axis=0), lines_LxS.max(axis=0), **band)
        if threshold is not None:
            mean.axhline(threshold, color=VERMILION, linestyle="--", label=f"threshold {threshold:g}")
    mean.set(title=_smoothed("Mean of each layer; grey band: lowest to highest layer", window))
    mean.set(xlabel="step", ylabel="mean |W| / σ")
    layer_lines(low, *_percent(_over_steps(run, "snr_low_ratio", None)), window)
    low.set(title="Share of components below the threshold (noise, decays faster)", xlabel="step", ylabel="share (%)")
    shared_legend(figure, mean)
    spread.set(title="Distribution in the memory of the checkpoint, from 0.01 up", xlabel="|W| / σ (log scale)")
    spread.set(ylabel="share of components per bin (%)")
    if inspection is None:
        say_not_recorded(spread)
        return figure
    edges = np.geomspace(1e-2, max(10.0, 1.1 * float(inspection.snr_LxHxKxV.max())), 61)
    num_layers = inspection.snr_LxHxKxV.shape[0]
    for layer, values in enumerate(inspection.snr_LxHxKxV):
        counts, _ = np.histogram(values, edges)
        colour = layer_colour(layer, num_layers)
        spread.stairs(100.0 * counts / values.size, edges, color=colour, linewidth=1.4, label=f"layer {layer}")
    spread.set_xscale("log")
    spread.xaxis.set_major_formatter("{x:g}")
    if threshold is not None:
        spread.axvspan(edges[0], threshold, color=ORANGE, alpha=0.15, linewidth=0, zorder=0)
        spread.axvline(threshold, color=VERMILION, linestyle="--", label=f"threshold {threshold:g}")
    spread.set_xlim(edges[0], edges[-1])
    spread.grid(alpha=0.3)
    return figure


def resonance_modes(run: RunFiles, inspection: Inspection | None) -> Figure:
    """Number and energy of the resonant modes over the steps; spectrum of the modes and their mask now."""
    figure = Figure(figsize=(9, 13), layout="constrained")
    modes, energy, spectrum, mask = figure.subplots(4, 1, height_ratios=(1, 1, 1.2, 1.4))
    figure.suptitle("Memory resonance: fast weights in the basis of the zeta zeros")
    threshold = None if run.config is None else run.config.model.resonance.threshold
    steps, modes_SxL = _over_steps(run, "resonant_modes", "resonance_history")
    window = smoothing_window(steps.size)
    layer_lines(modes, steps, modes_SxL, window)
    said = "the threshold" if threshold is None else f"{threshold:g} × the strongest"
    modes.set(title=_smoothed(f"Modes above {said}, mean over heads", window), xlabel="step", ylabel="modes")
    layer_lines(energy, *_over_steps(run, "resonance_energy", None), window)
    log_axis(energy)
    shared_legend(figure, modes)
    energy.set(title="Sum of mode energies, mean over heads", xlabel="step", ylabel="Σ e (log scale)")
    spectrum.set(title="Energies of the modes in the checkpoint's memory, strongest first: median of a layer's heads")
    spectrum.set(xlabel="rank of the mode", ylabel="e / strongest e (log scale)")
    mask.set(title="Mask: what the next consolidation keeps of each mode", xlabel="mode (index of its zeta zero)")
    mask.set(ylabel="layer, a row a head")
    if inspection is None:
        say_not_recorded(spectrum)
        say_not_recorded(mask)
        return figure
    _spectrum(spectrum, inspection.energies_LxHxK, threshold)
    _mask(mask, inspection.mask_LxHxK)
    return figure


def _spectrum(axes: Axes, energies_LxHxK: np.ndarray, threshold: float | None) -> None:
    strongest = np.maximum(energies_LxHxK.max(axis=-1, keepdims=True), 1e-30)
    relative_LxHxK = np.sort(energies_LxHxK / strongest, axis=-1)[..., ::-1]
    rank = np.arange(1, relative_LxHxK.shape[-1] + 1)
    num_layers = relative_LxHxK.shape[0]
    for layer, heads_HxK in enumerate(relative_LxHxK):
        colour = layer_colour(layer, num_layers)
        axes.plot(rank, np.median(heads_HxK, axis=0), color=colour, marker=".", label=f"layer {layer}")
    if threshold:
        axes.axhline(threshold, color=VERMILION, linestyle="--", label=f"threshold {threshold:g}")
        axes.legend(handles=axes.get_lines()[-1:], fontsize=8)
    log_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _mask(axes: Axes, mask_LxHxK: np.ndarray) -> None:
    num_layers, num_heads, num_modes = mask_LxHxK.shape
    rows = mask_LxHxK.reshape(num_layers * num_heads, num_modes)
    mesh = axes.pcolormesh(
        np.arange(num_modes + 1) + 0.5, np.arange(rows.shape[0] + 1), rows, cmap="cividis", vmin=0, vmax=1
    )
    axes.invert_yaxis()
    axes.set_yticks((np.arange(num_layers) + 0.5) * num_heads, [str(layer) for layer in range(num_layers)])
    for layer in range(1, num_layers):
        axes.axhline(layer * num_heads, color="white", linewidth=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = axes.inset_axes((1.02, 0.0, 0.02, 1.0))
    axes.figure.colorbar(mesh, cax=bar, label="kept (1 = all)")


def stability(run: RunFiles) -> Figure:
    """Energy of the memory, how it changes, what share of the heads is Lyapunov-stable, and how coherent it is."""
    figure = Figure(figsize=(9, 12), layout="constrained")
    energy, change, stable, coherence = figure.subplots(4, 1)
    figure.suptitle("Energy and Lyapunov stability of the memory")
    steps, energy_SxL = _over_steps(run, "energy", None)
    window = smoothing_window(steps.size)
    layer_lines(energy, steps, energy_SxL, window)
    log_axis(energy)
    energy.set(title=_smoothed("Energy E = ‖W‖², mean over rows and heads", window), ylabel="E (log scale)")
    layer_lines(change, *_over_steps(run, "energy_change", None), window)
    if shown(change).size:
        change.axhline(0.0, color=BLACK, linewidth=0.8)
    change.set(title="Growth of E over the last interval between consolidations", ylabel="E end − E start")
    layer_lines(stable, *_percent(_over_steps(run, "stable_ratio", "stability_history")), window)
    if shown(stable).size:
        stable.set_ylim(-4, 104)
    stable.set(title="Stable heads: E grew by at most a tenth of what was written", ylabel="share of heads (%)")
    layer_lines(coherence, *_over_steps(run, "coherence", None), window)
    coherence.set(title="Coherence: ‖W‖ over its value if no two writes cancelled", ylabel="‖W‖ / bound")
    coherence.set_xlabel("step")
    shared_legend(figure, energy)
    return figure


def _over_steps(run: RunFiles, name: str, history: str | None) -> tuple[np.ndarray, np.ndarray]:
    """A figure of each layer at every step, or the epochs' means where only the history has it."""
    values_SxL = run.curves.layer(name)
    if np.isfinite(values_SxL).any() or history is None:
        return run.curves.steps, values_SxL
    rows = [entry.get("per_layer") or [] for entry in getattr(run.history, history)]
    return np.array(run.history.steps, np.int64), table(rows, max((len(row) for row in rows), default=0))


def _percent(curves: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return curves[0], 100.0 * curves[1]


def _smoothed(title: str, window: int) -> str:
    return title if window == 1 else f"{title} (moving average of {window} steps)"

"""Everything `python -m phase2_jax.reporting` writes."""

import logging
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from phase2_jax.errors import UserError
from phase2_jax.reporting.drawing import save
from phase2_jax.reporting.inspection import Inspection, inspect
from phase2_jax.reporting.memory_plots import (
    half_life_spectrum,
    key_directions,
    resonance_modes,
    snr_selection,
    stability,
)
from phase2_jax.reporting.page import Picture, RunReport, report_page
from phase2_jax.reporting.passage import passage_figure
from phase2_jax.reporting.plots import gamma_evolution, learning_curves
from phase2_jax.reporting.run_files import RunFiles, read_runs
from phase2_jax.reporting.run_plots import comparison, optimisation
from phase2_jax.training.json_files import write_atomically
from phase2_jax.training.workdir import PLOTS, make_writable

PAGE = "report.html"
Draw = Callable[[RunFiles, Inspection | None], Figure]
_FIGURES: tuple[tuple[str, str, str, Draw], ...] = (
    (
        "learning_curves",
        "Learning curves",
        "Loss of every step and of every epoch's validation. A validation curve that rises while training falls is "
        "overfitting.",
        lambda run, _: learning_curves(run.history, run.curves),
    ),
    (
        "gamma_evolution",
        "Forgetting rate Γ per layer",
        "Γ of each layer over the steps, the same as a heat map, and the Γ of every token of one validation sequence.",
        lambda run, _: gamma_evolution(run.history, run.curves),
    ),
    (
        "half_life_spectrum",
        "Half-life spectrum",
        "How long each head remembers: short ones follow the last words, long ones keep names and topics.",
        half_life_spectrum,
    ),
    (
        "key_directions",
        "Directions of keys and queries",
        "How many tokens a head can tell apart: what is written under keys of one direction is recalled together.",
        key_directions,
    ),
    (
        "snr_selection",
        "SNR selection",
        "At each consolidation, components of the memory below the threshold are taken for noise and decay faster.",
        snr_selection,
    ),
    (
        "resonance_modes",
        "Resonance",
        "The memory seen in a basis of zeta frequencies; modes weaker than the threshold fade at each consolidation.",
        resonance_modes,
    ),
    (
        "stability",
        "Energy and Lyapunov stability",
        "Whether forgetting keeps up with writing: a memory whose energy keeps growing is not stable.",
        lambda run, _: stability(run),
    ),
    (
        "optimisation",
        "Learning rate, gradient norm, throughput",
        "Spikes of the gradient norm and drops of the throughput are worth a look at the same steps above.",
        lambda run, _: optimisation(run),
    ),
)


def write_report(workdirs: list[Path], passage: str | None = None) -> list[Path]:
    """Draw every figure of the runs and the page that holds them into the first one's `plots` folder.

    Args:
      workdirs: folders of runs.
      passage: text for the token-by-token view; None takes validation text of each run.

    Returns:
      what was written: the page, then the pictures.

    Raises:
      UserError: a folder that holds no readable history.
    """
    runs = read_runs(workdirs)
    folder = runs[0].workdir / PLOTS
    make_writable(folder, "name another run first, or a copy of this one")
    reports = [_report(run, folder, passage, "" if run is runs[0] else f"{_file_name(run)}.") for run in runs]
    together = None
    if len(runs) > 1:
        caption = "Solid, dashed, dash-dotted and dotted lines follow the order of the table above."
        together = Picture("Runs compared", caption, save(comparison(runs), folder / "comparison.png"))
    page = folder / PAGE
    write_atomically(page, [report_page(reports, together)])
    pictures = [picture.path for report in reports for picture in report.pictures]
    return [page, *([together.path] if together else []), *pictures]


def _report(run: RunFiles, folder: Path, passage: str | None, prefix: str) -> RunReport:
    inspection, missing = None, None
    try:
        inspection = inspect(run, passage)
    except UserError as error:
        missing = str(error)
        # The page says it, too, but who looks at the other figures may not see it there.
        logging.getLogger(__name__).warning("No look into the memory of %s: %s", run.name, missing)
    pictures = [
        Picture(title, caption, save(draw(run, inspection), folder / f"{prefix}{name}.png"))
        for name, title, caption, draw in _FIGURES
    ]
    if inspection is not None:
        path = save(passage_figure(inspection), folder / f"{prefix}passage.png")
        caption = "Below, the same text layer by layer, with what each token recalls."
        pictures.append(Picture("A passage in colours", caption, path))
    return RunReport(run, pictures, inspection, missing)


def _file_name(run: RunFiles) -> str:
    return run.name.replace("/", "_")

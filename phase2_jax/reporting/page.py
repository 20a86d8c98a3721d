"""The HTML page of a report: one file that holds its pictures, its style and its script."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phase2_jax.reporting.inspection import Inspection
from phase2_jax.reporting.page_assets import SCRIPT, STYLE
from phase2_jax.reporting.passage import passage_html
from phase2_jax.reporting.run_files import RunFiles
from phase2_jax.training.records import perplexity
from phase2_jax.training.workdir import flatten, plain


@dataclass(frozen=True)
class Picture:
    """A PNG on the page with a heading and a sentence or two that say how to read it."""

    title: str
    caption: str
    path: Path


@dataclass(frozen=True)
class RunReport:
    """What the page shows of one run; `missing` says why there is no inspection."""

    run: RunFiles
    pictures: Sequence[Picture]
    inspection: Inspection | None
    missing: str | None


def report_page(reports: Sequence[RunReport], comparison: Picture | None) -> str:
    """The whole page."""
    names = ", ".join(report.run.name for report in reports)
    links = "".join(f'<a href="#run{index}">{html.escape(report.run.name)}</a>' for index, report in enumerate(reports))
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Report: {html.escape(names)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head>\n<body>\n<h1>Training report: {html.escape(names)}</h1>",
        "<p>A language model whose memory W forgets at a rate Γ that every token sets anew: "
        "W ← exp(−Γ·dt)·W + η·k·vᵀ. Half of what was written is gone after ln 2 / (Γ·dt) tokens. "
        "Losses are in nats per token.</p>",
        f"<nav>{links}</nav>\n<h2>Results</h2>",
        _table(_results(reports)),
    ]
    if comparison is not None:
        parts += [_picture(comparison), "<h3>Settings that differ</h3>", _differences(reports)]
    for index, report in enumerate(reports):
        parts.append(_run(report, index, folded=index > 0))
    parts.append(f"<script>{SCRIPT}</script>\n</body>\n</html>\n")
    return "\n".join(parts)


def _run(report: RunReport, index: int, *, folded: bool) -> str:
    name = html.escape(report.run.name)
    body = [_picture(picture) for picture in report.pictures]
    body.append("<h3>A passage, token by token</h3>")
    if report.inspection is not None:
        body.append(
            f"<p>Read by the {html.escape(report.inspection.checkpoint)}. “Recalls most” is the earlier token whose "
            "write adds most to what the memory answers, over all heads of the layer; what consolidation changed in "
            "between is left out. Colours run from the 1 % to the 99 % quantile over all layers.</p>"
        )
        body.append(passage_html(report.inspection, f"passage{index}"))
    else:
        body.append(
            '<p class="missing">The spectrum of the heads, the distribution of |W|/σ, the mask of the modes and this '
            f"passage need a checkpoint: {html.escape(report.missing or 'it was not looked into')}.</p>"
        )
    inside = "\n".join(body)
    if folded:
        inside = f"<details><summary>Show the figures of {name}</summary>{inside}</details>"
    return f'<h2 id="run{index}">Run {name}</h2>\n{inside}'


def _picture(picture: Picture) -> str:
    encoded = base64.b64encode(picture.path.read_bytes()).decode("ascii")
    title = html.escape(picture.title)
    return (
        f'<figure><h3>{title}</h3><img alt="{title}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _results(reports: Sequence[RunReport]) -> list[list[str]]:
    rows = [
        [
            "run",
            "steps",
            "epochs",
            "best validation loss",
            "its perplexity",
            "last training loss",
            "mean Γ, last epoch",
            "tokens per second",
        ]
    ]
    for report in reports:
        history = report.run.history
        gamma = history.gamma_history[-1].get("mean") if history.gamma_history else None
        rows.append(
            [
                report.run.name,
                f"{max([*history.steps[-1:], *report.run.curves.steps[-1:].tolist()], default=0):,}",
                f"{history.total_epochs}",
                _number(history.best_val_loss),
                _number(perplexity(history.best_val_loss)),
                _number(history.train_losses[-1] if history.train_losses else None),
                _number(gamma),
                _number(history.tokens_per_second[-1] if history.tokens_per_second else None, ",.0f"),
            ]
        )
    return rows


def _number(value: float | None, form: str = ".4g") -> str:
    return "n/a" if value is None else f"{value:{form}}"


def _differences(reports: Sequence[RunReport]) -> str:
    if any(report.run.config is None for report in reports):
        return '<p class="missing">Not every run has its config.json.</p>'
    flat = [flatten(plain(report.run.config)) for report in reports if report.run.config is not None]
    names = [name for name in flat[0] if len({str(settings.get(name)) for settings in flat}) > 1]
    if not names:
        return "<p>None.</p>"
    rows = [["setting", *(report.run.name for report in reports)]]
    return _table(rows + [[name, *(str(settings.get(name)) for settings in flat)] for name in names])


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'

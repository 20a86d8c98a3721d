"""One passage, token by token: how fast it makes the memory forget, how strongly it writes, what is recalled."""

import html
import json
import math
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from phase2_jax.reporting.drawing import log_ticks
from phase2_jax.reporting.inspection import Inspection, half_lives

COLUMNS = 80
_MAP = "cividis"
_SPECIAL = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Layer:
    """What is coloured over the text.

    Attributes:
      title, unit: in words.
      values_LxN: one number a layer and token.
      logarithmic: of the colour scale.
    """

    title: str
    unit: str
    values_LxN: np.ndarray
    logarithmic: bool


def colourings(inspection: Inspection) -> list[Layer]:
    """Γ, write strength, size of the readout and surprise of each shown token; the last is the same in every layer."""
    gamma_LxN = inspection.gamma_LxTxP[:, inspection.first :].mean(axis=-1)
    surprise_LxN = np.broadcast_to(inspection.loss_N, gamma_LxN.shape)
    return [
        Layer("Forgetting rate Γ", "Γ, mean over heads", gamma_LxN, True),
        Layer("Write strength η", "η, mean over heads", inspection.eta_LxN, False),
        Layer("What the memory answers", "‖Wᵀq‖, mean over heads", inspection.readout_LxN, False),
        Layer("Surprise", "−log p of the token (nats)", surprise_LxN, False),
    ]


def passage_figure(inspection: Inspection) -> Figure:
    """The text four times, coloured by each of `colourings`, averaged over the layers."""
    layers = colourings(inspection)
    cells, num_rows = _grid(inspection.pieces)
    figure = Figure(figsize=(11, 1.6 + 4 * (0.5 + 0.19 * num_rows)), layout="constrained")
    figure.suptitle(f"A passage token by token, mean over layers ({inspection.checkpoint})")
    for axes, layer in zip(figure.subplots(len(layers), 1), layers, strict=True):
        values_N = layer.values_LxN.mean(axis=0)
        norm = _norm(values_N, layer.logarithmic)
        _text(axes, cells, num_rows, inspection.pieces, values_N, norm)
        axes.set_title(layer.title, fontsize=11)
        scale = ScalarMappable(norm, _MAP)
        bar = figure.colorbar(scale, ax=axes, label=layer.unit, pad=0.01, aspect=12, format="%.2g")
        if isinstance(norm, LogNorm):
            log_ticks(bar.ax, *bar.ax.get_ylim())
    return figure


def _grid(pieces: list[str]) -> tuple[list[tuple[int, int]], int]:
    """Row and column of each token's first character in lines of `COLUMNS`, and the number of lines."""
    cells, row, column = [], 0, 0
    for piece in pieces:
        width = min(len(piece), COLUMNS)
        if column + width > COLUMNS:
            row, column = row + 1, 0
        cells.append((row, column))
        column += width
        if piece.endswith("\n"):
            row, column = row + 1, 0
    return cells, row + 1


def _text(
    axes: Axes, cells: list[tuple[int, int]], num_rows: int, pieces: list[str], values_N: np.ndarray, norm: Normalize
) -> None:
    colours = mpl.colormaps[_MAP](norm(np.nan_to_num(values_N)))
    for (row, column), piece, colour in zip(cells, pieces, colours, strict=True):
        if not piece:
            continue
        shown = piece.translate(_SPECIAL)[:COLUMNS]
        axes.add_patch(Rectangle((column, row), len(shown), 1, facecolor=colour, linewidth=0))
        ink = "black" if _is_light(colour) else "white"
        for offset, character in enumerate(shown):
            axes.text(
                column + offset + 0.5,
                row + 0.55,
                # A dollar sign would begin a formula.
                character.replace("$", r"\$"),
                color=ink,
                ha="center",
                va="center",
                fontsize=8,
                family="monospace",
            )
    axes.set(xlim=(0, COLUMNS), ylim=(num_rows, 0))
    axes.set_axis_off()


def _norm(values: np.ndarray, logarithmic: bool) -> Normalize:
    """A scale from the 1 % to the 99 % quantile: single tokens would otherwise leave the rest in one colour."""
    finite = values[np.isfinite(values)]
    low, high = (float(value) for value in np.quantile(finite, (0.01, 0.99))) if finite.size else (0.0, 1.0)
    high = max(high, low + 1e-6 + 1e-3 * abs(low))
    return LogNorm(low, high, clip=True) if logarithmic and low > 0 else Normalize(low, high, clip=True)


def _is_light(colour: np.ndarray) -> bool:
    return float(np.dot(colour[:3], (0.299, 0.587, 0.114))) > 0.5


def passage_html(inspection: Inspection, identity: str) -> str:
    """The same to be explored: choose layer and colouring, point at a token to see its figures and what it recalls.

    Args:
      inspection: of a checkpoint.
      identity: makes the elements' ids unique on the page.
    """
    layers = colourings(inspection)
    data = {
        "colourings": [
            {"title": layer.title, "unit": layer.unit, "ends": _ends(layer), "shades": _shades(layer)}
            for layer in layers
        ],
        "figures": [_figures(layers[index].values_LxN) for index in range(3)],
        "surprise": _figures(inspection.loss_N[None])[0],
        "half_lives": _figures(half_lives(layers[0].values_LxN, inspection.dt)),
        "source": inspection.source_LxN.tolist(),
        "share": _figures(100.0 * inspection.share_LxN),
        "context": [[text.translate(_SPECIAL) for text in row] for row in inspection.context],
        "palette": (mpl.colormaps[_MAP](np.arange(0, 256, 4), bytes=True)[:, :3]).tolist(),
    }
    tokens = "".join(
        f'<span data-t="{index}">{_markup(piece)}</span>' for index, piece in enumerate(inspection.pieces) if piece
    )
    num_layers = inspection.eta_LxN.shape[0]
    layer_options = "".join(f'<option value="{layer}">layer {layer}</option>' for layer in range(num_layers))
    colour_options = "".join(
        f'<option value="{index}">{html.escape(layer.title)}</option>' for index, layer in enumerate(layers)
    )
    # "</" would end the script element inside a string.
    payload = json.dumps(data, ensure_ascii=False).replace("</", "<\\/")
    return f"""<div class="passage" id="{identity}">
<p><label>Colour: <select class="colouring">{colour_options}</select></label>
<label>Layer: <select class="layer">{layer_options}</select></label>
<span class="scale"></span></p>
<p class="tokens">{tokens}</p>
<p class="details">Point at a token to see its figures; the token that the memory recalls most for it is outlined.</p>
<script type="application/json">{payload}</script>
</div>"""


def _markup(piece: str) -> str:
    return html.escape(piece).replace("\n", "⏎<br>")


def _ends(layer: Layer) -> list[str]:
    norm = _norm(layer.values_LxN, layer.logarithmic)
    return [f"{norm.vmin:.3g}", f"{norm.vmax:.3g}"]


def _shades(layer: Layer) -> list[list[int]]:
    """Index of each token's colour in the palette; −1 where there is no figure."""
    shares_LxN = _norm(layer.values_LxN, layer.logarithmic)(np.nan_to_num(layer.values_LxN, nan=1e-9))
    return np.where(np.isfinite(layer.values_LxN), np.minimum(np.asarray(shares_LxN) * 64, 63), -1).astype(int).tolist()


def _figures(values: np.ndarray) -> list[list[str]]:
    return [[f"{value:.3g}" if math.isfinite(value) else "n/a" for value in row] for row in values.tolist()]

"""The Γ heat map as pixels: quick enough to draw during training, with its axes and scale written on it."""

import math

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LEFT, _TOP, _RIGHT, _BOTTOM = 70, 34, 110, 40
_MIN_WIDTH, _MAX_WIDTH, _HEIGHT = 512, 1024, 256
_FONT_SIZE = 13
_INK = (30, 30, 30)
_MISSING = (200, 200, 200)


def gamma_heatmap_image(gamma_LxN: np.ndarray) -> np.ndarray:
    """Picture of the forgetting rate, a row a layer (layer 0 on top), a column a token, in viridis on a log scale.

    Args:
        gamma_LxN: forgetting rates (per unit of dt); what is not finite and positive is drawn grey.

    Returns:
        uint8 array, height x width x RGB.
    """
    gamma_LxN = np.asarray(gamma_LxN, dtype=np.float64)
    num_layers, num_tokens = gamma_LxN.shape
    columns = _columns(num_tokens)
    row_height = max(_HEIGHT // num_layers, 4)
    low, high = _limits(gamma_LxN)
    rgb_LxN = _colours(gamma_LxN, low, high)
    picture = np.repeat(rgb_LxN[:, columns], row_height, axis=0)
    height, width = picture.shape[:2]
    canvas = np.full((_TOP + height + _BOTTOM, _LEFT + width + _RIGHT, 3), 255, np.uint8)
    canvas[_TOP : _TOP + height, _LEFT : _LEFT + width] = picture
    bar = slice(_LEFT + width + 20, _LEFT + width + 40)
    canvas[_TOP : _TOP + height, bar] = _colours(np.geomspace(high, low, height)[:, None], low, high)
    image = Image.fromarray(canvas)
    _label(image, num_layers, num_tokens, (width, height), (low, high))
    return np.asarray(image)


def _columns(num_tokens: int) -> np.ndarray:
    """The token that each pixel column shows: all tokens equally wide, unless there are more tokens than pixels."""
    repeat = -(-_MIN_WIDTH // num_tokens)
    if num_tokens * repeat <= _MAX_WIDTH:
        return np.repeat(np.arange(num_tokens), repeat)
    return np.linspace(0, num_tokens - 1, min(num_tokens, _MAX_WIDTH)).round().astype(int)


def _limits(gamma: np.ndarray) -> tuple[float, float]:
    """Ends of the colour scale on 1, 2, 5 of a decade, so that the scale seldom moves between epochs."""
    valid = gamma[np.isfinite(gamma) & (gamma > 0)]
    if valid.size == 0:
        return 0.1, 1.0
    steps = np.outer(10.0 ** np.arange(-38, 39), (1.0, 2.0, 5.0)).ravel()
    low = steps[max(np.searchsorted(steps, valid.min(), side="right") - 1, 0)]
    high = steps[min(np.searchsorted(steps, valid.max(), side="left"), steps.size - 1)]
    return float(low), float(high if high > low else 2.0 * low)


def _colours(gamma: np.ndarray, low: float, high: float) -> np.ndarray:
    valid = np.isfinite(gamma) & (gamma > 0)
    position = np.log(np.where(valid, gamma, low) / low) / math.log(high / low)
    rgb = mpl.colormaps["viridis"](np.clip(position, 0.0, 1.0), bytes=True)[..., :3]
    return np.where(valid[..., None], rgb, np.array(_MISSING, np.uint8))


def _label(
    image: Image.Image, num_layers: int, num_tokens: int, size: tuple[int, int], limits: tuple[float, float]
) -> None:
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT_SIZE)
    (width, height), (low, high) = size, limits
    draw.text((_LEFT, 8), "Gamma, forgetting rate per token (log scale)", _INK, font)
    row_height = height / num_layers
    for layer in range(0, num_layers, math.ceil((_FONT_SIZE + 2) / row_height)):
        middle = _TOP + (layer + 0.5) * row_height
        draw.text((_LEFT - 8, middle), f"layer {layer}", _INK, font, anchor="rm")
    below = _TOP + height + 6
    draw.text((_LEFT, below), "0", _INK, font, anchor="la")
    draw.text((_LEFT + width / 2, below), "token", _INK, font, anchor="ma")
    draw.text((_LEFT + width, below), str(num_tokens - 1), _INK, font, anchor="ra")
    for share in (0.0, 0.5, 1.0):
        value = high * (low / high) ** share
        draw.text((_LEFT + width + 46, _TOP + share * height), f"{value:.2g}", _INK, font, anchor="lm")

"""Values as colours in HTML: a table of numbers where it is small, else a picture of one pixel for each value."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float
from PIL import Image

from hooked_mllm.display.images import html_image

#: the largest table with a number in each cell: columns, and cells
_MOST_COLUMNS, _MOST_CELLS = 24, 288
_MOST_PIXELS = 256  # along each side of a picture
_BLUE, _RED = (37, 99, 235), (220, 38, 38)  # above and below zero
_STRONGEST = 0.6  # opacity below text, which stays readable in the colour of either theme


def html_heat(
    values: Float[np.ndarray, "row column"], row_names: Sequence[object], column_names: Sequence[object]
) -> str:
    r"""Values as colours: blue above zero, red below, opacity proportional to $|v| / \max|v|$, none where it is NaN."""
    if values.size == 0:
        return ""
    if values.shape[1] <= _MOST_COLUMNS and values.size <= _MOST_CELLS:
        return _table(values, row_names, column_names)
    return _picture(values, row_names, column_names)


def _strength(values: np.ndarray) -> np.ndarray:
    """The magnitude of each value as a share of the largest; 0 for NaN."""
    size = np.nan_to_num(np.abs(values))
    return size / (size.max() or 1.0)


def _table(values: np.ndarray, row_names: Sequence[object], column_names: Sequence[object]) -> str:
    form = _number_format(float(np.nan_to_num(np.abs(values)).max()))
    head = "".join(f"<th>{escape(str(name))}</th>" for name in ("", *column_names))
    lines = []
    for name, line, strengths in zip(row_names, values.tolist(), _strength(values).tolist(), strict=True):
        cells = "".join(_cell(value, strength, form) for value, strength in zip(line, strengths, strict=True))
        lines.append(f"<tr><th>{escape(str(name))}</th>{cells}</tr>")
    return f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _number_format(largest: float) -> str:
    """Decimals that suit the largest magnitude: 0.99 and 0.01, 2.20 and 0.05, 31.4 and 0.1."""
    if largest and not 1e-4 <= largest < 1e6:
        return ".1e"
    exponent = math.floor(math.log10(largest)) if largest else 0
    return f"z.{max(0, 2 - exponent) if exponent >= 0 else 1 - exponent}f"  # z: no minus before 0.00


def _cell(value: float, strength: float, form: str) -> str:
    if np.isnan(value):
        return "<td>–</td>"
    red, green, blue = _RED if value < 0 else _BLUE
    return f'<td style="background:rgba({red},{green},{blue},{_STRONGEST * strength:.2f})">{value:{form}}</td>'


def _picture(values: np.ndarray, row_names: Sequence[object], column_names: Sequence[object]) -> str:
    pooled = _pooled(_pooled(values, 0), 1)
    pixels = np.empty((*pooled.shape, 4), np.uint8)  # [row column rgba]
    pixels[..., :3] = np.where((pooled < 0)[..., None], _RED, _BLUE)
    pixels[..., 3] = np.round(_strength(pooled) * 15) * 17  # 16 levels from 0 to 255: the file stays small
    text = (
        f"{len(row_names)} rows, {row_names[0]} (top) to {row_names[-1]}; "
        f"{len(column_names)} columns, {column_names[0]} (left) to {column_names[-1]}"
    )
    height, width = (max(1, min(10, 560 // n)) * n for n in pooled.shape)
    style = f"width:{width}px;height:{height}px;image-rendering:pixelated"
    return f"{html_image(Image.fromarray(pixels), text, style)}<p>{escape(text)}</p>"


def _pooled(values: np.ndarray, axis: int) -> np.ndarray:
    """At most `_MOST_PIXELS` values along an axis: of each group of neighbors the one that is farthest from zero."""
    n = values.shape[axis]
    if n <= _MOST_PIXELS:
        return values
    edges = np.arange(1, _MOST_PIXELS) * n // _MOST_PIXELS
    groups = np.split(np.moveaxis(values, axis, 0), edges)
    farthest = [np.take_along_axis(g, np.nan_to_num(np.abs(g)).argmax(0)[None], 0)[0] for g in groups]
    return np.moveaxis(np.stack(farthest), 0, axis)

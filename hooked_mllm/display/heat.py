"""Values as colours in HTML: a table of numbers where it is small, else a picture of one pixel for each value."""

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
_STRONGEST = 0.6  # opacity: text in the colour of either theme stays readable on it


def html_heat(
    values: Float[np.ndarray, "row column"], row_names: Sequence[object], column_names: Sequence[object]
) -> str:
    r"""Values as colours: blue above zero, red below, opacity $0.6\,|v| / \max|v|$, nothing where a value is NaN.

    Args:
        values: The values.
        row_names: A name for each row.
        column_names: A name for each column.

    Examples:
        >>> html_heat(np.array([[0.0, 1.0]]), ["L0"], ["H0", "H1"]).count("<td")
        2
    """
    if values.size == 0:
        return ""
    if values.shape[1] <= _MOST_COLUMNS and values.size <= _MOST_CELLS:
        return _table(values, row_names, column_names)
    return _picture(values, row_names, column_names)


def _opacity(values: np.ndarray) -> np.ndarray:
    """The opacity of each value; 0 for NaN."""
    size = np.nan_to_num(np.abs(values))
    return _STRONGEST * size / (size.max() or 1.0)


def _table(values: np.ndarray, row_names: Sequence[object], column_names: Sequence[object]) -> str:
    opacity = _opacity(values)
    head = "".join(f"<th>{escape(str(name))}</th>" for name in ("", *column_names))
    lines = []
    for name, line, strengths in zip(row_names, values.tolist(), opacity.tolist(), strict=True):
        cells = "".join(map(_cell, line, strengths))
        lines.append(f"<tr><th>{escape(str(name))}</th>{cells}</tr>")
    return f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _cell(value: float, opacity: float) -> str:
    if np.isnan(value):
        return "<td>–</td>"
    red, green, blue = _RED if value < 0 else _BLUE
    return f'<td style="background:rgba({red},{green},{blue},{opacity:.2f})">{value:.2g}</td>'


def _picture(values: np.ndarray, row_names: Sequence[object], column_names: Sequence[object]) -> str:
    pooled = _pooled(_pooled(values, 0), 1)
    pixels = np.empty((*pooled.shape, 4), np.uint8)  # [row column rgba]
    pixels[..., :3] = np.where((pooled < 0)[..., None], _RED, _BLUE)
    levels = np.round(_opacity(pooled) / _STRONGEST * 15)  # 16 levels: the file stays small
    pixels[..., 3] = levels * (255 * _STRONGEST / 15)
    text = (
        f"{len(row_names)} rows, {row_names[0]} (top) to {row_names[-1]}; "
        f"{len(column_names)} columns, {column_names[0]} (left) to {column_names[-1]}"
    )
    height, width = (max(1, min(10, 560 // n)) * n for n in pooled.shape)
    style = f"width:{width}px;height:{height}px;image-rendering:pixelated"
    return f"{html_image(Image.fromarray(pixels), text, style)}<p>{escape(text)}</p>"


def _pooled(values: np.ndarray, axis: int) -> np.ndarray:
    """At most `_MOST_PIXELS` values along an axis: of neighbours the one that is farthest from zero."""
    if values.shape[axis] <= _MOST_PIXELS:
        return values
    groups = np.array_split(np.moveaxis(values, axis, 0), _MOST_PIXELS)
    farthest = [np.take_along_axis(g, np.nan_to_num(np.abs(g)).argmax(0)[None], 0)[0] for g in groups]
    return np.moveaxis(np.stack(farthest), 0, axis)

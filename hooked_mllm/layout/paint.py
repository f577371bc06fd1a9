"""Token values onto the pixels of the original."""

import numpy as np
from jaxtyping import Float, Int8

from hooked_mllm.layout.items import View

#: of two views with footprints of one size, the later one is painted on top
ORDER = (View.WHOLE, View.FRAME, View.BASE, View.THUMBNAIL, View.HIGHRES, View.TILE)


def paint(
    width: int,
    height: int,
    boxes: Float[np.ndarray, "token 4"],
    values: Float[np.ndarray, " token"],
    views: Int8[np.ndarray, " token"],
) -> Float[np.ndarray, "height width"]:
    """Every pixel takes the value of the token whose box holds its centre; NaN where there is none.

    Views with large footprints are painted first, finer ones over them.
    """
    out = np.full((height, width), np.nan)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    present = [v for v in ORDER if (views == v).any()]
    # relative rounding, so that equal cells count as equal whatever order their areas were summed in
    for view in sorted(present, key=lambda v: (-float(f"{np.median(area[views == v]):.6g}"), ORDER.index(v))):
        at = views == view
        _paint_grid(out, boxes[at], values[at])
    return out


def _paint_grid(out: np.ndarray, boxes: np.ndarray, values: np.ndarray) -> None:
    """Within a view the boxes are the cells of a grid, so a pixel's token is found by its column and its row."""
    height, width = out.shape
    col_of_token, col_of_pixel, seen_x = _cells(boxes[:, 0], boxes[:, 2], width)
    row_of_token, row_of_pixel, seen_y = _cells(boxes[:, 1], boxes[:, 3], height)
    table = np.full((row_of_token.max() + 1, col_of_token.max() + 1), -1)
    table[row_of_token, col_of_token] = np.arange(len(values))
    token = table[np.ix_(row_of_pixel, col_of_pixel)]
    seen = seen_y[:, None] & seen_x & (token >= 0)
    out[seen] = values[token[seen]]


def _cells(start: np.ndarray, end: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cell of each token, the cell of each of `n` pixels, and whether that cell holds the pixel's centre."""
    starts, first, cell = np.unique(start, return_index=True, return_inverse=True)
    centre = np.arange(n) + 0.5
    of_pixel = (np.searchsorted(starts, centre, side="right") - 1).clip(0)
    return cell, of_pixel, (centre >= starts[of_pixel]) & (centre < end[first][of_pixel])

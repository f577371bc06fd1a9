"""Paint token values onto the pixels of the original."""

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

from hooked_mllm.layout.items import View

#: of two views with footprints of equal size, the later one is painted on top
ORDER = (View.WHOLE, View.FRAME, View.BASE, View.THUMBNAIL, View.HIGHRES, View.TILE)


def paint(
    width: int,
    height: int,
    boxes: Float[np.ndarray, "token 4"],
    values: Float[np.ndarray, " token"],
    views: Int8[np.ndarray, " token"],
) -> Float[np.ndarray, "height width"]:
    """Every pixel takes the value of the token of the finest view whose box contains its centre; NaN without one."""
    picture = np.full((height, width), np.nan)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    present = [view for view in ORDER if (views == view).any()]
    # rounded to six digits, so that equal cells have equal areas in whatever order these were summed
    for view in sorted(present, key=lambda v: (-float(f"{np.median(area[views == v]):.6g}"), ORDER.index(v))):
        in_view = views == view
        _paint_grid(picture, boxes[in_view], values[in_view])
    return picture


def _paint_grid(
    picture: Float[np.ndarray, "height width"], boxes: Float[np.ndarray, "token 4"], values: Float[np.ndarray, " token"]
) -> None:
    """Paint one view in place. Its boxes are the cells of a grid, so column and row of a pixel determine its token."""
    height, width = picture.shape
    col_of_token, col_of_pixel, seen_x = _cells(boxes[:, 0], boxes[:, 2], width)
    row_of_token, row_of_pixel, seen_y = _cells(boxes[:, 1], boxes[:, 3], height)
    table = np.full((row_of_token.max() + 1, col_of_token.max() + 1), -1)  # [row col] -> token, -1 for an empty cell
    table[row_of_token, col_of_token] = np.arange(len(values))
    token = table[np.ix_(row_of_pixel, col_of_pixel)]  # [height width]
    seen = seen_y[:, None] & seen_x & (token >= 0)
    picture[seen] = values[token[seen]]


def _cells(
    start: Float[np.ndarray, " token"], end: Float[np.ndarray, " token"], n: int
) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " pixel"], Bool[np.ndarray, " pixel"]]:
    """The cell of each token, the cell of each of `n` pixels, and whether that cell contains the pixel's centre."""
    # tokens of a column (or row) share their start: its rank is the number of the column
    starts, first, cell = np.unique(start, return_index=True, return_inverse=True)
    centre = np.arange(n) + 0.5
    of_pixel = (np.searchsorted(starts, centre, side="right") - 1).clip(0)
    # grids may have gaps and end before the picture does
    return cell, of_pixel, (centre >= starts[of_pixel]) & (centre < end[first][of_pixel])

"""The exact area of a union of boxes and masks inside many rectangles."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from hooked_mllm.layout.regions import Corners


class Coverage:
    """The union of boxes and pixel masks; `area` measures it inside any rectangle.

    The edges of all shapes cut the plane into cells. The integral of the union's indicator over [0, x] x [0, y] is
    bilinear in a cell, so interpolating between its corners is exact, at fractional coordinates too.
    """

    def __init__(self, boxes: Sequence[Corners], masks: Sequence[Bool[np.ndarray, "height width"]] = ()) -> None:
        xs, ys = [box[i] for box in boxes for i in (0, 2)], [box[i] for box in boxes for i in (1, 3)]
        for mask in masks:
            xs.extend(_changing_columns(mask))
            ys.extend(_changing_columns(mask.T))
        self._x, self._y = np.unique(np.asarray(xs, float)), np.unique(np.asarray(ys, float))
        inside = np.zeros((len(self._y) - 1, len(self._x) - 1), dtype=bool)  # [row col] of cells
        for x0, y0, x1, y1 in boxes:  # every edge of a box is an edge of cells
            rows, cols = np.searchsorted(self._y, (y0, y1)), np.searchsorted(self._x, (x0, x1))
            inside[slice(*rows), slice(*cols)] = True
        for mask in masks:
            inside |= _mask_of_cells(mask, self._x, self._y)
        # [row col], in pixels
        area = inside * np.diff(self._y)[:, None] * np.diff(self._x)
        # 2D cumulative area; a zero row and column in front: [row col] of cells -> [row + 1, col + 1] of corners
        self._integral = np.pad(area.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def share(self, rectangles: Float[np.ndarray, "token 4"]) -> Float[np.ndarray, " token"]:
        """The share of each rectangle x0, y0, x1, y1 inside the union; NaN rectangles give NaN."""
        x0, y0, x1, y1 = rectangles.T
        return self.area(rectangles) / ((x1 - x0) * (y1 - y0))

    def area(self, rectangles: Float[np.ndarray, "token 4"]) -> Float[np.ndarray, " token"]:
        """Area of the union inside each rectangle x0, y0, x1, y1; NaN rectangles give NaN."""
        x0, y0, x1, y1 = rectangles.T
        # inclusion-exclusion over the four corners
        return self._cumulative(x1, y1) - self._cumulative(x0, y1) - self._cumulative(x1, y0) + self._cumulative(x0, y0)

    def _cumulative(
        self, x: Float[np.ndarray, " token"], y: Float[np.ndarray, " token"]
    ) -> Float[np.ndarray, " token"]:
        """Area of the union inside [0, x] x [0, y], interpolated between the corners of a cell."""
        (col, right), (row, down) = _locate(self._x, x), _locate(self._y, y)
        integral = self._integral
        above = integral[row, col] * (1 - right) + integral[row, col + 1] * right
        below = integral[row + 1, col] * (1 - right) + integral[row + 1, col + 1] * right
        return above * (1 - down) + below * down


def _changing_columns(mask: Bool[np.ndarray, "row col"]) -> Int[np.ndarray, " edge"]:
    """The column edges at which any row of the mask changes, its outline included."""
    padded = np.pad(mask, ((0, 0), (1, 1)))  # a mask that touches the border has an edge there
    return np.flatnonzero((padded[:, 1:] != padded[:, :-1]).any(0))


def _mask_of_cells(
    mask: Bool[np.ndarray, "height width"], x: Float[np.ndarray, " x_edge"], y: Float[np.ndarray, " y_edge"]
) -> Bool[np.ndarray, "row col"]:
    """The mask's value in each cell between the edges: that of the pixel at the cell's centre; False outside it."""
    rows, cols = (np.floor((edges[1:] + edges[:-1]) / 2).astype(int) for edges in (y, x))
    height, width = mask.shape
    valid = ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))
    return mask[np.ix_(rows.clip(0, height - 1), cols.clip(0, width - 1))] & valid


def _locate(
    edges: Float[np.ndarray, " edge"], values: Float[np.ndarray, " token"]
) -> tuple[Int[np.ndarray, " token"], Float[np.ndarray, " token"]]:
    """The cell that each coordinate lies in, and the fraction of the cell before it (0 to 1, clipped)."""
    cell = (np.searchsorted(edges, values, side="right") - 1).clip(0, len(edges) - 2)
    start, end = edges[cell], edges[cell + 1]
    return cell, ((values - start) / (end - start)).clip(0, 1)

"""How much of many rectangles a union of boxes and masks covers, exactly."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hooked_mllm.layout.regions import Corners


class Coverage:
    """The union of boxes and pixel masks, ready to be measured inside any rectangle.

    The plane is cut at every edge of the shapes, so each cell is wholly inside the union or wholly outside. The
    integral of such a function over [0, x] x [0, y] is bilinear within a cell: interpolating its values at the cell
    corners is exact, at fractional coordinates too, and what two shapes share counts once.
    """

    def __init__(self, boxes: Sequence[Corners], masks: Sequence[np.ndarray] = ()) -> None:
        xs, ys = [b[i] for b in boxes for i in (0, 2)], [b[i] for b in boxes for i in (1, 3)]
        for mask in masks:
            xs.extend(_changes(mask))
            ys.extend(_changes(mask.T))
        self._x, self._y = np.unique(np.asarray(xs, float)), np.unique(np.asarray(ys, float))
        inside = np.zeros((len(self._y) - 1, len(self._x) - 1), dtype=bool)
        for x0, y0, x1, y1 in boxes:
            rows, cols = np.searchsorted(self._y, (y0, y1)), np.searchsorted(self._x, (x0, x1))
            inside[slice(*rows), slice(*cols)] = True
        for mask in masks:
            inside |= _sample(mask, self._x, self._y)
        area = inside * np.diff(self._y)[:, None] * np.diff(self._x)
        self._integral = np.pad(area.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def area(self, rectangles: Float[np.ndarray, "token 4"]) -> Float[np.ndarray, " token"]:
        """Area of the union inside each rectangle x0, y0, x1, y1; NaN rectangles give NaN."""
        x0, y0, x1, y1 = rectangles.T
        to = self._up_to
        return to(x1, y1) - to(x0, y1) - to(x1, y0) + to(x0, y0)

    def _up_to(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        (col, right), (row, down) = _locate(self._x, x), _locate(self._y, y)
        s = self._integral
        above = s[row, col] * (1 - right) + s[row, col + 1] * right
        below = s[row + 1, col] * (1 - right) + s[row + 1, col + 1] * right
        return above * (1 - down) + below * down


def _changes(mask: np.ndarray) -> np.ndarray:
    """Columns at which some row of the mask changes, its outline included."""
    padded = np.pad(mask, ((0, 0), (1, 1)))
    return np.flatnonzero((padded[:, 1:] != padded[:, :-1]).any(0))


def _sample(mask: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rows, cols = (np.floor((edges[1:] + edges[:-1]) / 2).astype(int) for edges in (y, x))
    height, width = mask.shape
    valid = ((rows >= 0) & (rows < height))[:, None] & ((cols >= 0) & (cols < width))
    return mask[np.ix_(rows.clip(0, height - 1), cols.clip(0, width - 1))] & valid


def _locate(edges: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell that each coordinate lies in, and how far into it (0 to 1, clipped)."""
    cell = (np.searchsorted(edges, at, side="right") - 1).clip(0, len(edges) - 2)
    start, end = edges[cell], edges[cell + 1]
    return cell, ((at - start) / (end - start)).clip(0, 1)

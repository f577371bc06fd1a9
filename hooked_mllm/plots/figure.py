"""What all plots share: a figure outside pyplot, and colours that fit the sign of the values."""

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from hooked_mllm.errors import InputError, NumericsError

SEQUENTIAL, DIVERGING = "magma", "RdBu_r"


class NotebookFigure(Figure):
    """A figure that shows itself as the last value of a notebook cell, though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_array(values: Any, what: str) -> np.ndarray:
    """float64 on the CPU; NaN stands for "nothing here", an infinity is refused.

    Raises:
        InputError: not numbers.
        NumericsError: an infinity, or no number at all.
    """
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} should be an array of numbers: {error}") from error
    if np.isinf(array).any():
        raise NumericsError(f"{what} hold {int(np.isinf(array).sum())} infinities; expected finite numbers (or NaN)")
    return array


def colour_scale(
    values: np.ndarray,
    vmin: float | int | None = None,
    vmax: float | int | None = None,
    cmap: str | Colormap | None = None,
) -> tuple[str | Colormap, Normalize]:
    """From zero up for values that are never negative; white at zero, both signs alike, where some are.

    Raises:
        NumericsError: there is no number to draw.
    """
    there = values[~np.isnan(values)]
    if there.size == 0:
        raise NumericsError("nothing to draw: every value is NaN")
    if vmin is None and there.min() < 0:
        most = float(np.abs(there).max()) if vmax is None else abs(vmax)
        return cmap or DIVERGING, Normalize(-most, most)
    low = 0.0 if vmin is None else vmin
    high = float(there.max()) if vmax is None else vmax
    if not high > low:  # all zero: a scale needs some width
        high = low + 1.0
    return cmap or SEQUENTIAL, Normalize(low, high)


def plain_axes(axes: Axes) -> None:
    """No ticks and no frame: what is drawn is a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)

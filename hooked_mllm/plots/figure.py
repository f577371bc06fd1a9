"""What all plots share: a figure outside pyplot, and colours that fit the sign of the values."""

import io
from functools import lru_cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text
from torch import Tensor

from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.plots.protocols import Numbers

SEQUENTIAL, DIVERGING = "magma", "RdBu_r"


class NotebookFigure(Figure):
    """A figure outside pyplot that a notebook displays as the last value of a cell.

    Text between dollar signs that is no valid math, such as "$5 {to $6", is drawn as it is.
    """

    def draw(self, renderer: RendererBase) -> None:
        """Draw the figure."""
        for text in self.findobj(Text):
            if isinstance(text, Text) and not _is_drawable(text.get_text()):
                text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


@lru_cache(maxsize=256)
def _is_drawable(text: str) -> bool:
    """Whether matplotlib can draw a text: one with dollar signs is read as math."""
    if "$" not in text:
        return True
    try:
        MathTextParser("path").parse(text)
    except ValueError:
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches."""
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_array(values: Numbers, what: str) -> np.ndarray:
    """float64 on the CPU; NaN means that there is no value.

    Raises:
        InputError: not numbers.
        NumericsError: an infinity.
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

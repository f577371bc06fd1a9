"""What all plots share: a figure outside pyplot, and colours that fit the sign of the values."""

import io
from functools import lru_cache

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hooked_mllm.errors import InputError, NumericsError, nearest
from hooked_mllm.plots.protocols import Numbers

SEQUENTIAL, DIVERGING = "magma", "RdBu_r"


class NotebookFigure(Figure):
    """A figure outside pyplot, for notebooks; text that is no valid math, such as "$5 {to $6", is drawn as it is."""

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
    try:
        if "$" in text:
            MathTextParser("path").parse(text)
    except ValueError:
        return False
    return True


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty figure of `width` x `height` inches, with a title above all its axes."""
    if not all(0 < side < 1000 for side in (width, height)):
        raise InputError(f"Expected a figure of 0 to 1000 inches; got {width:g} x {height:g}: specify another panel=.")
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure


def as_array(values: Numbers, what: str) -> np.ndarray:
    """float64 on the CPU; NaN means that there is no value."""
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()  # NumPy has no bfloat16
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
    """From zero up for values that are never negative; white at zero, both signs alike, where some are."""
    if isinstance(cmap, str) and cmap not in colormaps:
        raise InputError(f"Expected a colour map of matplotlib; got {cmap!r}. {nearest(cmap, colormaps)}".rstrip())
    if np.isnan(values).all():
        raise NumericsError("nothing to draw: every value is NaN")
    if vmin is None and np.nanmin(values) < 0:
        largest = float(np.nanmax(np.abs(values))) if vmax is None else abs(vmax)
        return cmap or DIVERGING, Normalize(-largest, largest)
    low = 0.0 if vmin is None else vmin
    high = float(np.nanmax(values)) if vmax is None else vmax
    return cmap or SEQUENTIAL, Normalize(low, high if high > low else low + 1.0)  # all zero: a scale has a width


def integer_ticks(axes: Axes) -> None:
    """A few ticks at integers, on both axes."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))


def plain_axes(axes: Axes) -> None:
    """No ticks and no frame: what is drawn is a picture."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)

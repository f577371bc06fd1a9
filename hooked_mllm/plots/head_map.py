"""Layer x head heat maps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.plots.figure import colour_scale, new_figure
from hooked_mllm.plots.head_matrix import HeadMatrix, head_matrix
from hooked_mllm.plots.protocols import HeadChoice, ScoresLike

MARK = "#35ff6b"


class Colours(NamedTuple):
    """Ends of the colour scale and the colour map; None for the defaults of `colour_scale`."""

    vmin: float | int | None = None
    vmax: float | int | None = None
    cmap: str | Colormap | None = None


def head_map(
    scores: ScoresLike,
    top: HeadChoice | None = 10,
    *,
    title: str | None = None,
    vmin: float | int | None = None,
    vmax: float | int | None = None,
    cmap: str | Colormap | None = None,
) -> Figure:
    """Draw every head's score: heads across, layers down from 0, the top heads framed.

    Colours start at zero; scores with negative values get a scale with white at zero. Layers that were not measured
    stay grey.

    Args:
        scores: Head scores, or plain numbers `[layer head]` (an array, a tensor or nested lists; NaN: not measured).
        top: How many heads to frame (int; all, if there are fewer), which share (float), which ones ("L2H4", pairs, a
            `HeadSet`, a boolean mask, or a list of these), or None.
        title: Above the map; the scores' name by default.
        vmin: Lower end of the colours.
        vmax: Upper end of the colours.
        cmap: Colour map of matplotlib.

    Raises:
        HeadError: `top` is a share outside [0, 1], or heads of a model of another shape.
        InputError: scores that are no numbers `[layer head]`.

    Examples:
        >>> import numpy as np
        >>> figure = head_map(np.array([[0.1, 0.4], [0.3, 0.2]]), top="L0H1", title="RAM")
        >>> figure.axes[0].get_title()
        'RAM'
    """
    matrix = head_matrix(scores)
    figure = new_figure(*_size(*matrix.shape))
    _draw(figure, figure.add_subplot(), matrix, top, title, Colours(vmin, vmax, cmap))
    return figure


def head_maps(
    scores: Sequence[ScoresLike],
    top: HeadChoice | None = 10,
    *,
    titles: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw several scores of one model's heads side by side, each with colours of its own.

    As figure 4 of arXiv:2606.05843, where the maps of Retrieval Attention Mass and of the vision heads are compared.

    Args:
        scores: Head scores or plain numbers `[layer head]` each.
        top: In each map, how many of its own top heads to frame, which share, or which heads (in all maps the same).
        titles: Above each map; the scores' names by default.
        title: Above all maps; none by default.

    Raises:
        InputError: no scores, or another number of titles.
        HeadError: scores of models of different shape, or as for `head_map`.

    Examples:
        >>> figure = head_maps([[[0.1, 0.4], [0.3, 0.2]], [[0.0, 0.1], [0.9, 0.2]]], top=1, titles=["RAM", "KTR"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['RAM', 'KTR']
    """
    matrices = [head_matrix(item) for item in scores]
    names = [matrix.name for matrix in matrices] if titles is None else list(titles)
    if not matrices or len(names) != len(matrices):
        raise InputError(f"expected a title for each of one or more scores, got {len(names)} for {len(matrices)}")
    shapes = [matrix.shape for matrix in matrices]
    if len(set(shapes)) > 1:
        raise HeadError(f"expected scores of one model, got shapes {', '.join(map(str, shapes))}")
    width, height = _size(*shapes[0])
    figure = new_figure(width * len(matrices), height + (0.3 if title else 0.0))
    grid = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, matrix, name in zip(grid, matrices, names, strict=True):
        _draw(figure, axes, matrix, top, name, Colours())
    if title:
        figure.suptitle(title)
    return figure


def _draw(
    figure: Figure, axes: Axes, matrix: HeadMatrix, top: HeadChoice | None, title: str | None, colours: Colours
) -> None:
    axes.set_facecolor("0.8")
    cmap, norm = colour_scale(matrix.values, *colours)
    image = axes.imshow(matrix.values, cmap=cmap, norm=norm, aspect="equal", interpolation="nearest")
    for layer, head in matrix.selected(top):
        frame = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=1.6)
        frame.set_path_effects([withStroke(linewidth=3.0, foreground="black")])  # to be seen on every colour
        axes.add_patch(frame)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.set(xlabel="head", ylabel="layer", title=matrix.name if title is None else title)
    figure.colorbar(image, ax=axes, label=matrix.name, shrink=0.9)


def _size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Inches: square cells of a size that can be seen, on a page that can be printed."""
    cell = float(np.clip(7.0 / max(n_layers, n_heads), 0.16, 0.5))
    return max(3.6, cell * n_heads + 1.9), max(2.6, cell * n_layers + 1.0)

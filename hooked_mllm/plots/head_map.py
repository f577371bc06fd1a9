"""Layer x head heat maps."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from hooked_mllm.checks import checked
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.plots.figure import colour_scale, integer_ticks, new_figure
from hooked_mllm.plots.head_matrix import HeadMatrix, head_matrix
from hooked_mllm.plots.protocols import HeadChoice, ScoresLike

MARK = "#35ff6b"


@checked
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

    Colours start at zero, or are white at zero where scores are negative. Layers that were not measured are grey.

    Args:
        scores: Head scores, or plain numbers `[layer head]`; NaN: not measured.
        top: How many heads to frame (int; all, if there are fewer), which share (float), which heads, or None.
        title: Above the map; the scores' name by default.
        vmin: Lower end of the colours.
        vmax: Upper end of the colours.
        cmap: Colour map of matplotlib.

    Raises:
        HeadError: For a share outside [0, 1], or heads of a model of another shape.
        InputError: For scores that are no numbers `[layer head]`.

    Examples:
        >>> import numpy as np
        >>> figure = head_map(np.array([[0.1, 0.4], [0.3, 0.2]]), top="L0H1", title="RAM")
        >>> figure.axes[0].get_title()
        'RAM'
    """
    matrix = head_matrix(scores)
    figure = new_figure(*_size(*matrix.shape))
    _draw(figure, figure.add_subplot(), matrix, top, title, colour_scale(matrix.values, vmin, vmax, cmap))
    return figure


@checked
def head_maps(
    scores: Sequence[ScoresLike],
    top: HeadChoice | None = 10,
    *,
    titles: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw several scores of one model's heads side by side, each with colours of its own.

    As figure 4 of arXiv:2606.05843.

    Args:
        scores: Head scores or plain numbers `[layer head]` each.
        top: How many of each map's own top heads to frame, which share, or which heads (in all maps the same).
        titles: Above each map; the scores' names by default.
        title: Above all maps.

    Raises:
        InputError: For no scores, or another number of titles.
        HeadError: For scores of models of different shape, or as for `head_map`.

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
    figure = new_figure(width * len(matrices), height + (0.3 if title else 0.0), title)
    grid = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, matrix, name in zip(grid, matrices, names, strict=True):
        _draw(figure, axes, matrix, top, name, colour_scale(matrix.values))
    return figure


def _draw(
    figure: Figure,
    axes: Axes,
    matrix: HeadMatrix,
    top: HeadChoice | None,
    title: str | None,
    scale: tuple[str | Colormap, Normalize],
) -> None:
    axes.set_facecolor("0.8")
    image = axes.imshow(matrix.values, cmap=scale[0], norm=scale[1], aspect="equal", interpolation="nearest")
    for layer, head in matrix.selected(top):
        frame = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=1.6)
        frame.set_path_effects([withStroke(linewidth=3.0, foreground="black")])  # to be seen on every colour
        axes.add_patch(frame)
    integer_ticks(axes)
    axes.set(xlabel="head", ylabel="layer", title=matrix.name if title is None else title)
    figure.colorbar(image, ax=axes, label=matrix.name, shrink=0.9)


def _size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Inches, for square cells."""
    cell = float(np.clip(7.0 / max(n_layers, n_heads), 0.16, 0.5))
    return max(3.6, cell * n_heads + 1.9), max(2.6, cell * n_layers + 1.0)

"""Layer x head heat maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads import HeadScores, HeadSet
from hooked_mllm.plots.figure import colour_scale, new_figure

MARK = "#35ff6b"


def head_map(
    scores: HeadScores,
    top: int | float | HeadSet | None = 10,
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
        scores: [layer head].
        top: how many heads to frame (int; all, if there are fewer), which share (float), which ones, or None.
        title: above the map; the scores' name by default.
        vmin: lower end of the colours.
        vmax: upper end of the colours.
        cmap: matplotlib colour map.

    Raises:
        HeadError: `top` is a share outside [0, 1], or heads of a model of another shape.

    Examples:
        >>> figure = head_map(HeadScores([[0.1, 0.4], [0.3, 0.2]], name="RAM"), top=1)
        >>> figure.axes[0].get_title()
        'RAM'
    """
    figure = new_figure(*_size(*scores.shape))
    _draw(figure, figure.add_subplot(), scores, top, title, (vmin, vmax, cmap))
    return figure


def head_maps(
    scores: Sequence[HeadScores],
    top: int | float | HeadSet | None = 10,
    *,
    titles: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw several scores of one model's heads side by side, each with colours of its own.

    As figure 4 of arXiv:2606.05843, where the maps of Retrieval Attention Mass and of the vision heads are compared.

    Args:
        scores: [layer head] each.
        top: in each map, how many of its own top heads to frame, which share, or which heads (in all maps the same).
        titles: above each map; the scores' names by default.
        title: above all maps; none by default.

    Raises:
        InputError: no scores, or another number of titles.
        HeadError: scores of models of different shape, or as for `head_map`.

    Examples:
        >>> ram = HeadScores([[0.1, 0.4], [0.3, 0.2]], name="RAM")
        >>> figure = head_maps([ram, -ram], top=1, titles=["RAM", "turned around"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['RAM', 'turned around']
    """
    shown, names = list(scores), [one.name for one in scores] if titles is None else list(titles)
    if not shown or len(names) != len(shown):
        raise InputError(f"expected a title for each of one or more scores, got {len(names)} for {len(shown)}")
    if len({one.shape for one in shown}) > 1:
        raise HeadError(f"expected scores of one model, got shapes {', '.join(str(one.shape) for one in shown)}")
    width, height = _size(*shown[0].shape)
    figure = new_figure(width * len(shown), height + (0.3 if title else 0.0))
    grid = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, one, name in zip(grid, shown, names, strict=True):
        _draw(figure, axes, one, top, name, (None, None, None))
    if title:
        figure.suptitle(title)
    return figure


def _draw(
    figure: Figure,
    axes: Axes,
    scores: HeadScores,
    top: int | float | HeadSet | None,
    title: str | None,
    colours: tuple[Any, Any, Any],
) -> None:
    values, (vmin, vmax, cmap) = scores.values.numpy(), colours
    axes.set_facecolor("0.8")
    chosen, norm = colour_scale(values, vmin, vmax, cmap)
    image = axes.imshow(values, cmap=chosen, norm=norm, aspect="equal", interpolation="nearest")
    for layer, head in _marked(scores, top):
        frame = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=1.6)
        frame.set_path_effects([withStroke(linewidth=3.0, foreground="black")])  # to be seen on every colour
        axes.add_patch(frame)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    axes.set(xlabel="head", ylabel="layer", title=scores.name if title is None else title)
    figure.colorbar(image, ax=axes, label=scores.name, shrink=0.9)


def _marked(scores: HeadScores, top: int | float | HeadSet | None) -> HeadSet:
    if isinstance(top, HeadSet):
        if top.shape != scores.shape:
            raise HeadError(f"the scores are {scores.shape} (layers, heads), the heads to frame {top.shape}")
        return top
    if top is None:
        return scores.top(0)
    if isinstance(top, int):
        top = min(top, int(scores.measured.sum()))
    return scores.top(top)


def _size(n_layers: int, n_heads: int) -> tuple[float, float]:
    """Inches: square cells of a size that can be seen, on a page that can be printed."""
    cell = float(np.clip(7.0 / max(n_layers, n_heads), 0.16, 0.5))
    return max(3.6, cell * n_heads + 1.9), max(2.6, cell * n_layers + 1.0)

"""Stability across tasks: which tasks agree, and on which heads."""

import matplotlib
import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.plots.figure import SEQUENTIAL, integer_ticks, new_figure
from hooked_mllm.plots.protocols import StabilityLike, TaskAgreement


@checked
def stability_map(stability: StabilityLike, *, title: str | None = None) -> Figure:
    """Draw (a) the Spearman matrix of the tasks and (b) in how many tasks each head is among the top.

    As figure 5 of arXiv:2606.05843.

    Args:
        stability: What `hooked_mllm.metrics.stability` returns.
        title: Above both.

    Raises:
        InputError: For anything else.

    Examples:
        >>> from hooked_mllm import HeadScores
        >>> from hooked_mllm.metrics import stability
        >>> scores = HeadScores([[0.9, 0.1], [0.2, 0.3]])
        >>> [axes.get_title() for axes in stability_map(stability({"a": scores, "b": -scores})).axes[:2]]
        ['(a) Spearman correlation', '(b) tasks in which a head is in the top 5 %']
    """
    if not isinstance(stability, TaskAgreement):
        raise InputError(f"expected what hooked_mllm.metrics.stability returns, got {type(stability).__name__}")
    tasks, n = stability.tasks, len(stability.tasks)
    n_layers, n_heads = stability.counts.shape
    side = max(3.2, 0.8 * n + 1.2)
    figure = new_figure(side + max(5.0, 0.16 * n_heads + 2.0), max(side, 0.16 * n_layers + 1.2), title)
    left, right = figure.subplots(1, 2)
    matrix, low = stability.spearman, min(0.0, float(stability.spearman.min()))
    image = left.imshow(matrix, cmap="viridis", vmin=low, vmax=1.0)
    for i, j in np.ndindex(n, n):
        light = (matrix[i, j] - low) / (1.0 - low) > 0.6
        left.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color="black" if light else "white")
    left.set_xticks(range(n), tasks, rotation=30, ha="right")
    left.set_yticks(range(n), tasks)
    left.set_title("(a) Spearman correlation")
    figure.colorbar(image, ax=left, shrink=0.8)
    colours = matplotlib.colormaps[SEQUENTIAL].resampled(n + 1)
    norm = BoundaryNorm(np.arange(-0.5, n + 1), n + 1)
    counts = right.imshow(stability.counts.numpy(), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    integer_ticks(right)
    share = 100 - stability.percentile
    right.set(xlabel="head", ylabel="layer", title=f"(b) tasks in which a head is in the top {share:g} %")
    figure.colorbar(counts, ax=right, ticks=range(n + 1), label="number of tasks", shrink=0.8)
    return figure

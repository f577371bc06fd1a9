"""Head against head: two scores of one model."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hooked_mllm.checks import checked
from hooked_mllm.display.head_names import head_name
from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.plots.figure import new_figure
from hooked_mllm.plots.head_matrix import HeadMatrix, head_matrix
from hooked_mllm.plots.protocols import HeadChoice, ScoresLike


@checked
def scatter(
    x: ScoresLike, y: ScoresLike, label: HeadChoice = 5, *, diagonal: bool = False, title: str | None = None
) -> Figure:
    """Draw one score of every head against another; above it, how well their ranks agree (Spearman).

    Dots are coloured by layer. Heads that either score lacks are left out.

    Args:
        x: Head scores, or plain numbers `[layer head]`, across.
        y: The same, up.
        label: How many heads of the top of either score get their names (int), which share (float), or which heads.
        diagonal: Draw the line where both are equal, for scores of one unit.
        title: Above the dots; the Spearman coefficient and the number of heads by default.

    Raises:
        HeadError: For scores of models of different shape, fewer than two heads in common, or a share outside [0, 1].
        NumericsError: If all the scores of one are equal.

    Examples:
        >>> import numpy as np
        >>> effects = np.array([[0.1, 0.4], [0.3, 0.2]])
        >>> scatter(effects * 2, effects).axes[0].get_title()
        'Spearman 1.000, 4 heads'
    """
    across, up = head_matrix(x, "x"), head_matrix(y, "y")
    if across.shape != up.shape:
        raise HeadError(f"expected scores of one model, got different shapes: {across.shape} and {up.shape}")
    both = across.measured & up.measured
    rank = _rank_correlation(across, up, both)
    layers = both.nonzero()[0]
    figure = new_figure(4.8, 4.0)
    axes = figure.add_subplot()
    last = max(across.shape[0] - 1, 1)
    dots = axes.scatter(across.values[both], up.values[both], c=layers, cmap="viridis", s=18, vmin=0, vmax=last)
    if diagonal:
        axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    for head in dict.fromkeys([*across.selected(label), *up.selected(label)]):
        if both[head]:
            at = (float(across.values[head]), float(up.values[head]))
            axes.annotate(head_name(*head), at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    text = f"Spearman {rank:.3f}, {len(layers)} heads" if title is None else title
    axes.set(xlabel=across.name, ylabel=up.name, title=text)
    axes.grid(alpha=0.3)
    figure.colorbar(dots, ax=axes, label="layer", shrink=0.9)
    return figure


def _rank_correlation(x: HeadMatrix, y: HeadMatrix, both: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if both.sum() < 2:
        raise HeadError(f"{x.name} and {y.name} have fewer than two measured heads in common.")
    for matrix in (x, y):
        if np.ptp(matrix.values[both]) == 0:
            raise NumericsError(f"All scores of {matrix.name} are equal: a rank correlation is not defined.")
    result: Any = spearmanr(x.values[both], y.values[both])
    return float(result.statistic)

"""Scores of groups of heads, side by side."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.plots.ablation_curves import COLOURS
from hooked_mllm.plots.figure import as_array, new_figure
from hooked_mllm.plots.protocols import Numbers


@checked
def group_bars(
    groups: Mapping[str, Mapping[str, Numbers]],
    *,
    ylabel: str = "Key Token Ratio",
    title: str | None = None,
) -> Figure:
    """Draw the mean score of groups of heads as bars side by side, with a dot for every head.

    As figure 6b of arXiv:2606.05843.

    Args:
        groups: Model -> group, such as "top 15" -> scores of its heads.
        ylabel: What the scores are.
        title: Above the bars.

    Raises:
        InputError: For no models, models with different groups, or a group without heads.
        NumericsError: For an infinity.

    Examples:
        >>> figure = group_bars({"toy": {"top 2": [0.9, 0.7], "bottom 2": [0.0, 0.1]}})
        >>> [round(float(bar.get_height()), 2) for bar in figure.axes[0].patches]
        [0.8, 0.05]
    """
    names = list(dict.fromkeys(name for model in groups.values() for name in model))
    if not names or any(list(model) != names for model in groups.values()):
        raise InputError(
            f"expected models with the same groups of heads, got {[[*model] for model in groups.values()]}"
        )
    figure = new_figure(1.6 + 0.55 * len(groups) * (len(names) + 0.6), 3.4)
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        colour = COLOURS.get(name.split()[0], f"C{i}")
        for j, model in enumerate(groups.values()):
            scores = as_array(model[name], f"scores of {name!r}")
            if scores.ndim != 1 or not scores.size:
                raise InputError(f"{name!r}: expected the scores of one head or more, got shape {scores.shape}")
            x = j + (i - (len(names) - 1) / 2) * width
            axes.bar(x, scores.mean(), width * 0.9, color=colour, alpha=0.75, label=name if j == 0 else None)
            spread = np.linspace(-0.3, 0.3, scores.size) * width if scores.size > 1 else np.zeros(1)
            axes.plot(x + spread, scores, ".", color="black", markersize=3)
    axes.set(xticks=range(len(groups)), xticklabels=list(groups), ylabel=ylabel, title=title or "")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    return figure

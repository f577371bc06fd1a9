"""Curves over the number of heads."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.plots.figure import as_array, new_figure
from hooked_mllm.plots.protocols import Coverage, CoverageLike


@checked
def coverage_curve(
    curves: Mapping[str, CoverageLike] | CoverageLike,
    ks: Sequence[int] | None = None,
    *,
    title: str = "Key Token Coverage of the top-k heads",
) -> Figure:
    """Draw how much of the target a growing group of heads covers: KTC of the top k heads against k.

    Args:
        curves: One curve, or label -> curve: what `KeyTokenCoverage` computes, or shares `[k]` from 0 to 1.
        ks: The numbers of heads, for curves without their own; 1, 2, 3, ... by default.
        title: Above the curves.

    Raises:
        InputError: For no curves, or a curve of another shape, of another length than `ks`, or outside [0, 1].

    Examples:
        >>> figure = coverage_curve({"RAM": [0.4, 0.7, 0.9], "random": [0.1, 0.2, 0.3]})
        >>> len(figure.axes[0].lines)
        2
    """
    shown: Mapping[str, CoverageLike] = curves if isinstance(curves, Mapping) else {"": curves}
    if not shown:
        raise InputError("nothing to draw: expected at least one curve")
    figure = new_figure(5.0, 3.4)
    axes = figure.add_subplot()
    for label, curve in shown.items():
        own_ks = curve.ks if isinstance(curve, Coverage) else ks
        shares = as_array(curve.coverage if isinstance(curve, Coverage) else curve, f"curve {label!r}")
        if shares.ndim != 1 or shares.size == 0:
            raise InputError(f"curve {label!r}: expected shares [k], got shape {shares.shape}")
        if not ((shares >= 0) & (shares <= 1)).all():
            raise InputError(f"curve {label!r}: coverage is a share from 0 to 1, got {shares.min()} to {shares.max()}")
        x = np.arange(1, shares.size + 1) if own_ks is None else np.asarray(own_ks)
        if x.shape != shares.shape:
            raise InputError(f"curve {label!r} has {shares.size} values for {x.size} numbers of heads")
        axes.plot(x, shares, label=label or None, marker="." if shares.size <= 30 else None)
    axes.set(xlabel="number of heads k", ylabel="target tokens covered", title=title, ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.grid(alpha=0.3)
    if any(shown):
        axes.legend(frameon=False)
    return figure

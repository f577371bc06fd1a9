"""What a model can still do as its heads are ablated."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.plots.figure import new_figure
from hooked_mllm.plots.protocols import Curve, CurvesLike

COLOURS = {"top": "#c8102e", "bottom": "#1f5fa8", "random": "#6b7280"}
STYLES = ("-", "--", ":", "-.")
MARKED = 30


@checked
def ablation_curves(
    curves: CurvesLike,
    *,
    chance: float | int | None = None,
    level: float | None = 0.95,
    title: str | None = None,
) -> Figure:
    """Draw an objective against the number of heads ablated: top heads red, bottom heads blue, random ones grey.

    As figure 6a of arXiv:2606.05843. Bands are bootstrap intervals over the samples. The random line is the mean over
    the seeds, each a thin line, and ends where no control is left.

    Args:
        curves: What `AblationCurve.run` returns, or label -> such a result, each drawn in a line style of its own.
        chance: Height of a dotted line.
        level: Level of the bands; None draws none.
        title: Above the curves.

    Raises:
        InputError: For no curves, something else, curves of different objectives, or more than four.

    Examples:
        >>> import numpy as np
        >>> from hooked_mllm.metrics import AblationCurveResult
        >>> values = {"top": np.array([[[1.0, 1.0], [0.0, 1.0]]])}
        >>> curve = AblationCurveResult(ks=(0, 4), per_sample=values, heads={})
        >>> ablation_curves(curve).axes[0].lines[0].get_ydata().tolist()
        [1.0, 0.5]
    """
    shown: Mapping[str, Curve] = curves if isinstance(curves, Mapping) else {"": curves}
    if not 0 < len(shown) <= len(STYLES):
        raise InputError(f"expected one to {len(STYLES)} curves to draw, got {len(shown)}")
    for curve in shown.values():
        if not isinstance(curve, Curve):
            raise InputError(f"expected what AblationCurve.run returns, got {type(curve).__name__}")
    objectives = {curve.objective for curve in shown.values()}
    if len(objectives) > 1:
        raise InputError(f"expected curves of one objective, got {', '.join(sorted(objectives))}: draw them apart")
    figure = new_figure(5.4, 3.6)
    axes = figure.add_subplot()
    for style, curve in zip(STYLES, shown.values(), strict=False):
        for ranking in curve.rankings:
            colour, mean = COLOURS[ranking], curve.mean(ranking)
            options: Any = {"color": colour, "linestyle": style}
            axes.plot(curve.ks, mean, marker="." if len(curve.ks) <= MARKED else None, **options)
            if ranking == "random" and len(curve.values[ranking]) > 1:
                for values in curve.values[ranking]:  # [seed k]
                    axes.plot(curve.ks, values, linewidth=0.6, alpha=0.6, **options)
            if level is not None and curve.n_samples >= 5:  # the least that an interval needs
                low, high = curve.interval(ranking, level)
                axes.fill_between(curve.ks, low, high, color=colour, alpha=0.15, linewidth=0)
    if chance is not None:
        axes.axhline(chance, color="black", linestyle=":", linewidth=1)
    axes.set(xlabel="number of heads ablated", ylabel=objectives.pop(), title=title or "")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    _legend(axes, shown, chance)
    return figure


def _legend(axes: Axes, shown: Mapping[str, Curve], chance: float | int | None) -> None:
    rankings = dict.fromkeys(ranking for curve in shown.values() for ranking in curve.rankings)
    entries = [Line2D([], [], color=COLOURS[ranking], label=f"{ranking} heads") for ranking in rankings]
    if len(shown) > 1:
        styles = zip(STYLES, shown, strict=False)
        entries += [Line2D([], [], color="black", linestyle=style, label=label) for style, label in styles]
    if chance is not None:
        entries.append(Line2D([], [], color="black", linestyle=":", linewidth=1, label=f"chance {chance:g}"))
    axes.legend(handles=entries, frameon=False)

"""Head against head: two scores of one model."""

from matplotlib.figure import Figure

from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadScores
from hooked_mllm.plots.figure import new_figure


def scatter(
    x: HeadScores, y: HeadScores, label: int | float = 5, *, diagonal: bool = False, title: str | None = None
) -> Figure:
    """Draw one score of every head against another; above it, how well their ranks agree (Spearman).

    Dots are coloured by layer. Heads that either score lacks are left out.

    Args:
        x: [layer head], across.
        y: [layer head], up.
        label: how many heads of the top of either score get their names: a number (all, if there are fewer) or a share.
        diagonal: draw the line where both are equal, for scores of one unit.
        title: above the dots; the Spearman coefficient and the number of heads by default.

    Raises:
        HeadError: scores of models of different shape, fewer than two heads in common, or a share outside [0, 1].
        NumericsError: all the scores of one are equal.

    Examples:
        >>> real = HeadScores([[0.1, 0.4], [0.3, 0.2]], name="PatchingEffect(z)")
        >>> scatter(real * 2, real).axes[0].get_title()
        'Spearman 1.000, 4 heads'
    """
    rank = x.spearman(y)
    both = x.measured & y.measured
    places = both.nonzero()
    across, up = x.values[both].numpy(), y.values[both].numpy()
    figure = new_figure(4.8, 4.0)
    axes = figure.add_subplot()
    dots = axes.scatter(across, up, c=places[:, 0].numpy(), cmap="viridis", s=18, vmin=0, vmax=max(x.n_layers - 1, 1))
    if diagonal:
        axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    for layer, head in _named(x, y, label):
        if bool(both[layer, head]):
            at = (float(x.values[layer, head]), float(y.values[layer, head]))
            axes.annotate(f"L{layer}H{head}", at, xytext=(4, 3), textcoords="offset points", fontsize=7)
    text = f"Spearman {rank:.3f}, {len(places)} heads" if title is None else title
    axes.set(xlabel=x.name, ylabel=y.name, title=text)
    axes.grid(alpha=0.3)
    figure.colorbar(dots, ax=axes, label="layer", shrink=0.9)
    return figure


def _named(x: HeadScores, y: HeadScores, label: int | float) -> list[tuple[int, int]]:
    if isinstance(label, bool) or (isinstance(label, int) and label < 0):
        raise HeadError(f"Expected a number of heads to name, at least 0, or a share; got {label!r}.")
    tops = [s.top(min(label, int(s.measured.sum())) if isinstance(label, int) else label) for s in (x, y)]
    return list(tops[0] | tops[1])

"""Latency of prefill against the length of the context."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, NullLocator

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.plots.figure import as_array, new_figure
from hooked_mllm.plots.protocols import TimedVariants as TimedVariants
from hooked_mllm.plots.protocols import TimesLike

COMPILED = ", rest compiled"


@checked
def prefill(times: TimesLike, base: str | None = None, *, title: str | None = None) -> Figure:
    """Draw latency against context length, and next to it the speedup over one of the curves.

    The form of figure 7 of arXiv:2606.05843. A label that ends in ", rest compiled" is drawn dotted with squares, in
    the colour of the one without.

    Args:
        times: What `bench_prefill` returned or `PrefillRecord.load` read. Or label -> context length in tokens ->
            milliseconds: one number, or several, of which the mean is drawn and the range shaded.
        base: The label that speedups are taken over. By default that of a record's table (cuDNN, or torch's choice of
            SDPA) if it was timed, else the first one.
        title: Above the latencies; by default a record's model, else "Prefill latency".

    Raises:
        InputError: For nothing to draw, times that are not positive, or a `base` that is not there.

    Examples:
        >>> figure = prefill({"cuDNN": {8192: [10.0, 11.0], 16384: [30.0]}, "hybrid": {8192: 8.0, 16384: 15.0}})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['milliseconds', 'speedup over cuDNN']
    """
    runs, usual, model = _runs(times)
    if not any(runs.values()):
        raise InputError("nothing to draw: expected times of at least one variant at one length")
    if base is None:
        base = usual if usual in runs else next(label for label, by_length in runs.items() if by_length)
    if base not in runs:
        raise InputError(f"speedups are over one of {sorted(runs)}; got {base!r}")
    figure = new_figure(10.5, 3.8)
    latency, speedup = figure.subplots(1, 2)
    for label, style in _styles([label for label, by_length in runs.items() if by_length]).items():
        lengths = sorted(runs[label])
        ms = [runs[label][n] for n in lengths]
        latency.plot(lengths, [x.mean() for x in ms], label=label, **style)
        latency.fill_between(lengths, [x.min() for x in ms], [x.max() for x in ms], color=style["color"], alpha=0.2)
        shared = [n for n in lengths if n in runs[base]]
        speedup.plot(shared, [runs[base][n].mean() / runs[label][n].mean() for n in shared], **style)
    latency.set(yscale="log", ylabel="milliseconds", title=title or model or "Prefill latency")
    speedup.set(ylabel=f"speedup over {base}", title=f"Speedup over {base}")
    speedup.set_ylim(bottom=0)
    latency.yaxis.set_major_formatter(_Plain(labelOnlyBase=False, minor_thresholds=(2, 1)))
    latency.yaxis.set_minor_formatter(_Plain(labelOnlyBase=False, minor_thresholds=(2, 1)))
    for axes in (latency, speedup):
        _lengths_across(axes, sorted({n for by_length in runs.values() for n in by_length}))
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _runs(times: TimesLike) -> tuple[dict[str, dict[int, np.ndarray]], str | None, str | None]:
    """Milliseconds `[run]` by label and length; of a record, also the label to compare with and the model."""
    usual = model = None
    if isinstance(times, TimedVariants):
        usual, model = times.titles.get(times.base), times.settings.get("model")
        measured = {label: times.times(name) for name, label in times.titles.items()}
        times = {label: by_length for label, by_length in measured.items() if by_length}
    if not isinstance(times, Mapping) or not all(isinstance(by_length, Mapping) for by_length in times.values()):
        expected = "what bench_prefill returns, or label -> context length -> milliseconds"
        raise InputError(f"expected {expected}, got {type(times).__name__}")
    runs = {}
    for label, by_length in times.items():
        runs[label] = {n: np.atleast_1d(as_array(ms, f"times of {label!r}")) for n, ms in by_length.items()}
        if any(ms.size == 0 or not (ms > 0).all() for ms in runs[label].values()):
            raise InputError(f"times of {label!r}: expected positive milliseconds")
    return runs, usual, model


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each label; a compiled variant has the colour of the one without."""
    plain = list(dict.fromkeys(label.removesuffix(COMPILED) for label in labels))
    palette = colormaps["tab10" if len(plain) <= 10 else "tab20"]
    styles = {}
    for label in labels:
        line, marker = (":", "s") if label.endswith(COMPILED) else ("-", "o")
        colour = palette(plain.index(label.removesuffix(COMPILED)) % palette.N)
        styles[label] = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4}
    return styles


def _lengths_across(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("context length (tokens)")
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n // 1024:.0f}k" if n % 1024 == 0 else f"{n:.0f}"))
    axes.grid(alpha=0.3)


class _Plain(LogFormatter):
    """The ticks that matplotlib would label, as plain numbers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,g}" if super().__call__(x, pos) else ""

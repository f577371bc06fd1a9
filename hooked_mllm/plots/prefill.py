"""Latency of prefill against the length of the context."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatter, NullLocator

from hooked_mllm.errors import InputError
from hooked_mllm.plots.figure import as_array, new_figure
from hooked_mllm.plots.protocols import Numbers
from hooked_mllm.plots.protocols import TimedVariants as TimedVariants

COMPILED = ", rest compiled"


def prefill(
    times: TimedVariants | Mapping[str, Mapping[int, Numbers]], base: str | None = None, *, title: str | None = None
) -> Figure:
    """Draw latency against context length, and next to it the speedup over one of the curves.

    The form of figure 7 of arXiv:2606.05843.

    A label that ends in ", rest compiled" is drawn dotted with squares, in the colour of the one without.

    Args:
        times: What `bench_prefill` returned or `PrefillRecord.load` read: its variants under their titles. Or label ->
            context length in tokens -> milliseconds, one number or several of which the mean is drawn and the range
            shaded.
        base: The label that speedups are taken over. By default that of a record's table (cuDNN, or torch's choice of
            SDPA) if it was timed, else the first one.
        title: Above the latencies; by default a record's model, else "Prefill latency".

    Raises:
        InputError: nothing to draw, times that are not positive, or a `base` that is not there.

    Examples:
        >>> figure = prefill({"cuDNN": {8192: [10.0, 11.0], 16384: [30.0]}, "hybrid": {8192: 8.0, 16384: 15.0}})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['milliseconds', 'speedup over cuDNN']
    """
    if not isinstance(times, Mapping):
        usual, title = times.titles.get(times.base), title or times.settings.get("model")
        found = {label: times.times(name) for name, label in times.titles.items()}
        times = {label: at for label, at in found.items() if at}
        base = usual if base is None and usual in times else base
    if not any(times.values()):
        raise InputError("nothing to draw: expected times of at least one variant at one length")
    base = next(label for label, at in times.items() if at) if base is None else base
    if base not in times:
        raise InputError(f"speedups are over one of {sorted(times)}; got {base!r}")
    figure = new_figure(10.5, 3.8)
    latency, speedup = figure.subplots(1, 2)
    plain = dict.fromkeys(label.removesuffix(COMPILED) for label, at in times.items() if at)
    palette = colormaps["tab10" if len(plain) <= 10 else "tab20"]
    colours = {label: palette(i % palette.N) for i, label in enumerate(plain)}
    every = sorted({n for at in times.values() for n in at})
    for label, at in times.items():
        lengths = sorted(at)
        runs = [np.atleast_1d(as_array(at[n], f"times of {label!r}")) for n in lengths]
        if any(r.size == 0 or not (r > 0).all() for r in runs):
            raise InputError(f"times of {label!r}: expected positive milliseconds")
        if not lengths:
            continue
        means = {n: float(r.mean()) for n, r in zip(lengths, runs, strict=True)}
        plain = label.removesuffix(COMPILED)
        line, marker = ("-", "o") if plain == label else (":", "s")
        style = {"color": colours[plain], "linestyle": line, "marker": marker, "markersize": 4}
        latency.plot(lengths, list(means.values()), label=label, **style)
        latency.fill_between(lengths, [r.min() for r in runs], [r.max() for r in runs], color=style["color"], alpha=0.2)
        shared = [n for n in lengths if n in times[base]]
        ratios = [float(as_array(times[base][n], f"times of {base!r}").mean()) / means[n] for n in shared]
        speedup.plot(shared, ratios, **style)
    latency.set(yscale="log", ylabel="milliseconds", title=title or "Prefill latency")
    speedup.set(ylabel=f"speedup over {base}", title=f"Speedup over {base}")
    speedup.set_ylim(bottom=0)
    for which in (latency.yaxis.set_major_formatter, latency.yaxis.set_minor_formatter):
        which(_Plain(labelOnlyBase=False, minor_thresholds=(2, 1)))
    for axes in (latency, speedup):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context length (tokens)")
        axes.xaxis.set_major_locator(FixedLocator(every))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens(int(n))))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


class _Plain(LogFormatter):
    """The ticks that matplotlib would label, as plain numbers."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:,g}" if super().__call__(x, pos) else ""


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)

"""Latency of prefill against the length of the context."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, ScalarFormatter

from hooked_mllm.errors import InputError
from hooked_mllm.plots.figure import as_array, new_figure


def prefill(
    times: Mapping[str, Mapping[int, Any]], base: str | None = None, *, title: str = "Prefill latency"
) -> Figure:
    """Draw latency against context length, and beside it the speedup over one of the curves.

    The form of figure 7 of arXiv:2606.05843.

    Args:
        times: label -> context length in tokens -> milliseconds, one number or several of which the mean is drawn and
            the range shaded.
        base: The label that speedups are taken over; the first one by default.
        title: Above the latencies.

    Raises:
        InputError: nothing to draw, times that are not positive, or a `base` that is not there.

    Example:
        >>> figure = prefill({"cuDNN": {8192: [10.0, 11.0], 16384: [30.0]}, "hybrid": {8192: 8.0, 16384: 15.0}})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['milliseconds', 'speedup over cuDNN']
    """
    if not any(times.values()):
        raise InputError("nothing to draw: expected times of at least one variant at one length")
    base = next(label for label, at in times.items() if at) if base is None else base
    if base not in times:
        raise InputError(f"speedups are over one of {sorted(times)}; got {base!r}")
    figure = new_figure(10.5, 3.8)
    latency, speedup = figure.subplots(1, 2)
    every = sorted({n for at in times.values() for n in at})
    for label, at in times.items():
        lengths = sorted(at)
        runs = [np.atleast_1d(as_array(at[n], f"times of {label!r}")) for n in lengths]
        if any(r.size == 0 or not (r > 0).all() for r in runs):
            raise InputError(f"times of {label!r}: expected positive milliseconds")
        if not lengths:
            continue
        means = {n: float(r.mean()) for n, r in zip(lengths, runs, strict=True)}
        style = "--" if "removed" in label else "-"
        (line,) = latency.plot(lengths, list(means.values()), style, marker=".", label=label)
        latency.fill_between(
            lengths, [r.min() for r in runs], [r.max() for r in runs], color=line.get_color(), alpha=0.2
        )
        shared = [n for n in lengths if n in times[base]]
        ratios = [float(np.mean(times[base][n])) / means[n] for n in shared]
        speedup.plot(shared, ratios, style, marker=".", color=line.get_color())
    latency.set(yscale="log", ylabel="milliseconds", title=title)
    speedup.set(ylabel=f"speedup over {base}", title=f"Speedup over {base}")
    speedup.set_ylim(bottom=0)
    latency.yaxis.set_major_formatter(ScalarFormatter())
    for axes in (latency, speedup):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context length (tokens)")
        axes.xaxis.set_major_locator(FixedLocator(every))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens(int(n))))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)

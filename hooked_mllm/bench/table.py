"""Prefill times as text: one table a length, ratios beside the ceiling."""

from hooked_mllm.bench.record import Cell, PrefillRecord

_HEADER = (
    f"{'variant':<38}{'mean ms':>11}{'sd':>8}{'x cuDNN':>9}{'x FA2':>8}{'ceiling':>9}{'peak GiB':>10}{'first s':>9}"
)
_NO_CUDNN = (f"{'x cuDNN':>9}{'x FA2':>8}", f"{'x SDPA':>9}{'':>8}")


def table(record: PrefillRecord) -> str:
    """Every length of a record.

    "x cuDNN" and "x FA2": how many times as fast as the uncompiled model on that attention ("x SDPA" where torch chose
    the kernel). "ceiling": "x cuDNN" of the same model with attention removed, compiled where the row is. "peak GiB":
    all that was allocated on the fullest GPU. "first s": the first warm-up forward; what it compiled is in it.
    """
    settings = record.settings
    lines = [
        f"{settings['model']}: {settings['n_layers']} layers x {settings['n_heads']} heads, {settings['dtype']}, "
        f"{' + '.join(settings['devices'])}; timed forwards: {settings['runs']}, {settings['clock']}"
    ]
    for context in record.contexts:
        cells = [cell for cell in record.cells if cell.context == context]
        base = record.base
        lines += ["", f"{context:,} tokens", _HEADER if base == "cudnn" else _HEADER.replace(*_NO_CUDNN)]
        lines += [_row(record, cell, base) for cell in cells]
        if len({cell.session for cell in cells}) > 1:
            lines.append("(rows of several runs of the command: these did not take turns)")
    return "\n".join(lines)


def _row(record: PrefillRecord, cell: Cell, base: str) -> str:
    title = record.titles[cell.variant]
    if cell.failed is not None:
        return f"{title:<38}{cell.failed:>19}"
    removed = "removed-compiled" if cell.variant.endswith("-compiled") else "removed"
    ratios = (
        record.speedup(cell.context, cell.variant, base),
        record.speedup(cell.context, cell.variant, "flash"),
        record.speedup(cell.context, removed, base),
    )
    texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    peak = "" if cell.peak_gib is None else f"{cell.peak_gib:.1f}"
    first = "" if cell.first_s is None else f"{cell.first_s:.1f}"
    return (
        f"{title:<38}{cell.mean:>11.1f}{cell.spread:>8.1f}{texts[0]:>9}{texts[1]:>8}{texts[2]:>9}{peak:>10}{first:>9}"
    )

"""Prefill times as text: one table for each length."""

from hooked_mllm.bench.record import Cell, PrefillRecord
from hooked_mllm.display.text import text_table

_HEADER = ("variant", "mean ms", "sd", "x cuDNN", "x FA2", "ceiling", "peak GiB", "first s")
_NO_CUDNN = ("variant", "mean ms", "sd", "x SDPA", "", "ceiling", "peak GiB", "first s")
_WIDTHS = (38, 9, 6, 7, 6, 7, 8, 7)


def table(record: PrefillRecord) -> str:
    """The tables of all lengths of a record.

    "x cuDNN", "x FA2", "x SDPA": speedup over the uncompiled model with that attention. "ceiling": the speedup of the
    model without attention. "peak GiB": of the fullest GPU. "first s": the first warm-up forward pass.
    """
    settings = record.settings
    lines = [
        f"{settings['model']}: {settings['n_layers']} layers x {settings['n_heads']} heads, {settings['dtype']}, "
        f"{' + '.join(settings['devices'])}; timed forward passes: {settings['runs']}, {settings['clock']}"
    ]
    for context in record.contexts:
        cells = [cell for cell in record.cells if cell.context == context]
        header = _HEADER if record.base == "cudnn" else _NO_CUDNN
        table_lines = [header, *(_line(record, cell) for cell in cells)]
        lines += ["", f"{context:,} tokens", text_table(table_lines, align="<>>>>>>>", least=_WIDTHS)]
        if len({cell.session for cell in cells}) > 1:
            lines.append("(rows of several runs of the command, which were not interleaved)")
    return "\n".join(lines)


def _line(record: PrefillRecord, cell: Cell) -> tuple[str, ...]:
    title = record.titles[cell.variant]
    if cell.failed is not None:
        return title, cell.failed, *[""] * 6
    removed = "removed-compiled" if cell.variant.endswith("-compiled") else "removed"
    pairs = (cell.variant, record.base), (cell.variant, "flash"), (removed, record.base)
    ratios = [record.speedup(cell.context, *pair) for pair in pairs]
    texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
    peak = "" if cell.peak_gib is None else f"{cell.peak_gib:.1f}"
    first = "" if cell.first_s is None else f"{cell.first_s:.1f}"
    return title, f"{cell.mean:.1f}", f"{cell.spread:.1f}", *texts, peak, first

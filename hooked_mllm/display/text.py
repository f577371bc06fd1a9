"""Text for people: tables, byte counts, runs of numbers, shortened lines."""

from collections.abc import Iterable, Sequence


def text_table(cells: Iterable[Sequence[object]], align: str = "", least: Sequence[int] = ()) -> str:
    """A table whose columns are as wide as their longest cell, two spaces apart.

    `align` has "<" or ">" for each column, "<" where it ends; `least` is the least width of each column.
    """
    lines = [[str(cell) for cell in line] for line in cells]
    minimum = dict(enumerate(least))
    widths = [max(minimum.get(i, 0), *map(len, column)) for i, column in enumerate(zip(*lines, strict=True))]
    sides = align.ljust(len(widths), "<")
    padded = (zip(line, sides, widths, strict=True) for line in lines)
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width in line).rstrip() for line in padded)


def human_bytes(count: int) -> str:
    """A number of bytes with a binary unit, such as "3.0 MiB"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"


def number_runs(numbers: Iterable[int]) -> str:
    """Whole numbers in ascending order, consecutive ones joined: "0-3, 5"."""
    runs: list[list[int]] = []  # [first, last] of each
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def shortened(text: str, limit: int = 80) -> str:
    """Text in one line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"

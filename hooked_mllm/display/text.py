"""Text for people: tables, byte counts, runs of numbers, shortened lines."""

from collections.abc import Iterable, Sequence


def text_table(cells: Iterable[Sequence[object]], align: str = "", least: Sequence[int] = ()) -> str:
    """A table whose columns are as wide as their longest cell, two spaces apart.

    Args:
        cells: The lines, header included; all with the same number of cells.
        align: "<" or ">" for each column; left where it ends.
        least: The least width of each column.

    Examples:
        >>> print(text_table([("head", "score"), ("L2H4", 0.5)], align="<>"))
        head  score
        L2H4    0.5
    """
    lines = [[str(cell) for cell in line] for line in cells]
    columns = list(zip(*lines, strict=True))
    least = [*least, *[0] * len(columns)]
    widths = [max(least[i], *map(len, column)) for i, column in enumerate(columns)]
    sides = align.ljust(len(widths), "<")
    padded = (zip(line, sides, widths, strict=True) for line in lines)
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width in line).rstrip() for line in padded)


def human_bytes(count: int) -> str:
    """A number of bytes with a binary unit.

    Examples:
        >>> human_bytes(3 * 2**20)
        '3.0 MiB'
    """
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def number_runs(numbers: Iterable[int]) -> str:
    """Whole numbers in ascending order, consecutive ones joined.

    Examples:
        >>> number_runs([0, 1, 2, 3, 5])
        '0-3, 5'
    """
    runs: list[list[int]] = []  # [first, last] of each
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def shortened(text: str, limit: int = 80) -> str:
    """Text in one line of at most `limit` characters.

    Examples:
        >>> shortened("what color is the star ?", 12)
        'what color…'
    """
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"

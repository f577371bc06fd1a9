"""A TokenLayout in words: one line, or a table."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.layout.items import View

TEXT_KINDS = ("system", "template", "question", "answer", "padding")


def runs(mask: Bool[Tensor, " pos"]) -> list[tuple[int, int]]:
    """The contiguous true ranges (start, end), end exclusive.

    Examples:
        >>> runs(torch.tensor([True, True, False, True]))
        [(0, 2), (3, 4)]
    """
    edge = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff()
    starts, ends = (edge == 1).nonzero()[:, 0], (edge == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _ranges(spans: list[tuple[int, int]], most: int = 3) -> str:
    text = " ".join(f"{a}:{b}" for a, b in spans[:most])
    return text if len(spans) <= most else f"{text} ... {spans[-1][0]}:{spans[-1][1]} ({len(spans)} spans)"


def rows(layout: Any) -> list[tuple[str, str, str]]:
    """Name, positions and remarks of each kind of text, each image and each video that the layout has."""
    table = []
    for number, item in enumerate(layout.items):
        at = layout.item == number
        size = f"{item.width}x{item.height} px"
        if item.kind == "video":
            size += f", {item.n_frames} frames, {min(item.times_s):g} to {max(item.times_s):g} s"
        views = [f"{int((item.views == v).sum())} {v.name.lower()}" for v in View if v and (item.views == v).any()]
        none = int((~layout.pixels[at]).sum())
        views += [f"{none} without pixels"] if none else []
        table.append((item.name, _ranges(runs(at), 2), f"{size}; {', '.join(views)}"))
    for name in TEXT_KINDS:
        spans = layout.spans(name)
        if spans:
            table.append((name, _ranges(spans), ""))
    return table


def summary(layout: Any) -> str:
    """One line."""
    parts = [f"{name} {where}" + (f" ({what})" if what else "") for name, where, what in rows(layout)]
    return f"TokenLayout({len(layout)} tokens: {'; '.join(parts)})"


def describe(layout: Any) -> str:
    """One line per image, video and kind of text."""
    table = [("what", "positions", ""), *rows(layout), ("last", str(layout.last_index), "")]
    left, middle = (max(len(row[i]) for row in table) for i in (0, 1))
    return "\n".join(f"{a:<{left}}  {b:<{middle}}  {c}".rstrip() for a, b, c in table)

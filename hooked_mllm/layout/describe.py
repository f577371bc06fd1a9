"""A TokenLayout as text: one line, or a table."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mllm.layout.items import View, VisualItem

HEADER = ("what", "positions", "")
#: the kinds of positions that are listed, in order
TEXT_KINDS = ("system", "template", "question", "answer", "padding")


def runs(mask: Bool[Tensor, " pos"]) -> list[tuple[int, int]]:
    """The contiguous true ranges (start, end), end exclusive."""
    edge = torch.nn.functional.pad(mask.to(torch.int8), (1, 1)).diff()  # 1 where a range starts, -1 where it ends
    starts, ends = (edge == 1).nonzero()[:, 0], (edge == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _ranges(spans: list[tuple[int, int]], most: int = 3) -> str:
    text = " ".join(f"{a}:{b}" for a, b in spans[:most])
    return text if len(spans) <= most else f"{text} ... {spans[-1][0]}:{spans[-1][1]} ({len(spans)} spans)"


def overview(
    items: Sequence[VisualItem],
    item_of: Int[Tensor, " pos"],
    pixels: Bool[Tensor, " pos"],
    spans: Mapping[str, list[tuple[int, int]]],
) -> list[tuple[str, str, str]]:
    """Name, positions and remarks of each image, each video and each kind of text."""
    table = []
    for number, item in enumerate(items):
        positions = item_of == number
        size = f"{item.width}x{item.height} px"
        if item.kind == "video":
            size += f", {item.n_frames} frames, {min(item.times_s):g} to {max(item.times_s):g} s"
        views = [f"{int((item.views == v).sum())} {v.name.lower()}" for v in View if v and (item.views == v).any()]
        n_blank = int((~pixels[positions]).sum())
        views += [f"{n_blank} without pixels"] if n_blank else []
        table.append((item.name, _ranges(runs(positions), 2), f"{size}; {', '.join(views)}"))
    return table + [(name, _ranges(ranges), "") for name, ranges in spans.items() if ranges]


def summary(parts: Sequence[tuple[str, str, str]], n: int) -> str:
    """One line from an `overview` and the number of tokens."""
    texts = [f"{name} {where}" + (f" ({what})" if what else "") for name, where, what in parts]
    return f"TokenLayout({n} tokens: {'; '.join(texts)})"

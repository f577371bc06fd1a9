"""The kinds of positions of the input."""

from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from jaxtyping import Int8
from torch import Tensor

from hooked_mllm.errors import LayoutError, nearest

SPAN_NAMES = ("system", "question", "answer")


class Kind(IntEnum):
    """What a position of the input is."""

    TEMPLATE = 0
    SYSTEM = 1
    QUESTION = 2
    ANSWER = 3
    VISUAL = 4
    PADDING = 5


def kinds_of_spans(n: int, spans: Mapping[str, Sequence[tuple[int, int]]]) -> Int8[Tensor, " pos"]:
    """A `Kind` for each of `n` positions from the ranges of the texts; all others are template."""
    kinds = torch.full((n,), Kind.TEMPLATE, dtype=torch.int8)
    for name, ranges in spans.items():
        if name not in SPAN_NAMES:
            raise LayoutError(f"Spans are named {', '.join(SPAN_NAMES)}; got {name!r}. {nearest(name, SPAN_NAMES)}")
        for start, end in ranges:
            if not 0 <= start <= end <= n:
                raise LayoutError(f"The {name} span ({start}, {end}) does not lie within the {n} positions.")
            present = kinds[start:end]
            if (present != Kind.TEMPLATE).any():
                other = Kind(int(present[present != Kind.TEMPLATE][0])).name.lower()
                raise LayoutError(f"The {name} span ({start}, {end}) overlaps the {other} span.")
            kinds[start:end] = Kind[name.upper()]
    return kinds

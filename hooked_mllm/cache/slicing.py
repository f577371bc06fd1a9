"""One sample of a batch, out of a cache: along the batch axis in the language model, by images in the vision tower."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, compress

import torch
from torch import Tensor

from hooked_mllm.cache.lazy import Entry, LazyPattern, value_of
from hooked_mllm.families.base import Rows


def vision_slice(entry: Entry, rows: Sequence[Rows], chosen: Sequence[int], packed: bool) -> Entry | None:
    """The rows of `[1 pos ...]` (packed tower) or `[tile ...]` that belong to some samples; None if they have none."""
    spans = [span for sample in chosen for span in rows[sample]]
    if not spans:
        return None
    if isinstance(entry, LazyPattern):
        return _pattern(entry, spans, packed)
    value = value_of(entry)
    axis = 1 if packed else 0
    total = sum(stop - start for ranges in rows for start, stop in ranges)
    shrink = total // value.shape[axis]  # the projector of a packed tower joins several positions into one
    return _cut(value, axis, [(start // shrink, stop // shrink) for start, stop in spans])


def restacked(rows: Sequence[Rows], chosen: Sequence[int]) -> list[Rows]:
    """The rows of the selected samples after all other rows are dropped."""
    start, out = 0, []
    for sample in chosen:
        spans: Rows = []
        for first, last in rows[sample]:
            spans.append((start, start + last - first))
            start += last - first
        out.append(spans)
    return out


def _cut(x: Tensor, axis: int, spans: Rows) -> Tensor:
    return torch.cat([x.narrow(axis, start, stop - start) for start, stop in spans], dim=axis)


def _pattern(entry: LazyPattern, spans: Rows, packed: bool) -> LazyPattern:
    q, k = (_cut(x, 2 if packed else 0, spans) for x in (entry.q, entry.keys()))  # [batch head pos d_head]
    segments = None
    if packed:
        lengths = entry.mask.segments or ()
        ends = accumulate(lengths)
        inside = [any(start < end <= stop for start, stop in spans) for end in ends]
        segments = tuple(compress(lengths, inside))
    return replace(entry, q=q, k=k, mask=entry.mask.resized(len(q), q.shape[2], segments))

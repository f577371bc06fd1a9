"""One sample of a batch, out of a cache: along the batch axis in the language model, by images in the vision tower."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hooked_mllm.cache.lazy import Entry, LazyPattern, value_of
from hooked_mllm.families.base import Rows


def vision_slice(entry: Entry, rows: Sequence[Rows], chosen: Sequence[int], packed: bool) -> Entry | None:
    """The rows of an activation of the vision tower or the projector that belong to some samples.

    Args:
        entry: The activation: `[1 position ...]` of a packed tower, `[tile ...]` otherwise.
        rows: Rows of the tower that belong to each sample.
        chosen: The samples.
        packed: Which of the two it is.

    Returns:
        None when the samples have no image.
    """
    total = sum(stop - start for ranges in rows for start, stop in ranges)
    wanted = [span for sample in chosen for span in rows[sample]]
    if not wanted:
        return None
    if isinstance(entry, LazyPattern):
        return _pattern(entry, wanted, packed)
    value = value_of(entry)
    axis = 1 if packed else 0
    shrink = total // value.shape[axis]  # the projector of a packed tower joins several positions into one
    parts = [value.narrow(axis, start // shrink, (stop - start) // shrink) for start, stop in wanted]
    return torch.cat(parts, dim=axis)


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


def _pattern(entry: LazyPattern, wanted: Rows, packed: bool) -> LazyPattern:
    def cut(x: Tensor) -> Tensor:
        axis = 2 if packed else 0
        return torch.cat([x.narrow(axis, start, stop - start) for start, stop in wanted], dim=axis)

    q, k = cut(entry.q), cut(entry.keys())
    if not packed:
        return replace(entry, q=q, k=k, mask=entry.mask.resized(len(q), q.shape[2]))
    ends = torch.tensor(entry.mask.segments or ()).cumsum(0).tolist()
    inside = [any(start < end <= stop for start, stop in wanted) for end in ends]
    segments = tuple(n for n, keep in zip(entry.mask.segments or (), inside, strict=True) if keep)
    return replace(entry, q=q, k=k, mask=entry.mask.resized(1, q.shape[2], segments))

"""The definition of the attention profile, in plain torch: for any device, with all rows in memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: the dense query heads of a layer, and the sink and the window of its other heads
Streaming = tuple[Sequence[int], int, int]


def seen_keys(
    places: Int[Tensor, "batch query"],
    heads: int,
    keys: int,
    start: Int[Tensor, " batch"],
    end: Int[Tensor, " batch"],
    streaming: Streaming | None,
) -> Bool[Tensor, "batch head query key"]:
    """A query at position p sees key j iff `start <= j <= p`, `j < end`, and, in a streaming head, j is near.

    Near is `j < start + sink` or `j > p - window`.
    """
    key = torch.arange(keys, device=places.device)
    place = places[:, None, :, None]
    first, last = (bound.to(places.device)[:, None, None, None] for bound in (start, end))
    seen = (key <= place) & (key >= first) & (key < last)
    if streaming is None:
        return seen.expand(-1, heads, -1, -1)
    dense, sink, window = streaming
    flags = torch.zeros(heads, 1, 1, dtype=torch.bool)
    flags[list(dense)] = True
    return seen & ((key > place - window) | (key < first + sink) | flags.to(places.device))


def naive_attention_profile(
    q: Sequence[Float[Tensor, "batch head query d_head"]],
    k: Sequence[Float[Tensor, "batch kv_head key d_head"]],
    scale: Sequence[float],
    places: Int[Tensor, "batch query"],
    weight: Float[Tensor, "batch query"],
    start: Int[Tensor, "layer batch"],
    end: Int[Tensor, "layer batch"],
    streaming: Sequence[Streaming | None],
) -> Float[Tensor, "layer batch head key"]:
    """`sum_i w_i softmax_j(s q_i k_j)` for each layer, in float32 at least; a row that sees nothing counts as 0."""
    out = []
    for number, (left, right) in enumerate(zip(q, k, strict=True)):
        wide = torch.promote_types(left.dtype, torch.float32)
        heads, keys = left.shape[1], right.shape[2]
        right = right.to(wide).repeat_interleave(heads // right.shape[1], dim=1)
        seen = seen_keys(places, heads, keys, start[number], end[number], streaming[number])
        scores = (left.to(wide) @ right.transpose(2, 3) * scale[number]).masked_fill(~seen, -torch.inf)
        rows = torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0.0)
        out.append((rows * weight[:, None, :, None].to(wide)).sum(2))
    return torch.stack(out)

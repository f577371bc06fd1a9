"""The definition of the attention profile in plain torch: on any device, with all attention rows in memory."""

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.kernels.implementations import Bound, Keys, Queries
from hooked_mllm.kernels.streaming_window import head_flags, visible_keys_at

#: the dense query heads of a layer, and the sink and the window of its other heads
Streaming = tuple[Sequence[int], int, int]


def seen_keys(
    places: Int[Tensor, "batch query"], heads: int, keys: int, start: Bound, end: Bound, streaming: Streaming | None
) -> Bool[Tensor, "batch head query key"]:
    """The keys that each query of each head sees; see `visible_keys_at`. `streaming` is None if all heads are dense."""
    dense, sink, window = (range(heads), 0, 1) if streaming is None else streaming
    return visible_keys_at(places, keys, head_flags(dense, heads), sink, window, start, end)


def naive_attention_profile(
    q: Sequence[Queries], k: Sequence[Keys], scale: Sequence[float],
    places: Int[Tensor, "batch query"], weight: Float[Tensor, "batch query"],
    start: Int[Tensor, "layer batch"], end: Int[Tensor, "layer batch"], streaming: Sequence[Streaming | None],
) -> Float[Tensor, "layer batch head key"]:  # fmt: skip
    """`sum_i w_i softmax_j(s q_i k_j)` for each layer, in float32 or wider; 0 for a query without visible keys."""
    profiles = []
    for layer, (queries, keys) in enumerate(zip(q, k, strict=True)):
        dtype = torch.promote_types(queries.dtype, torch.float32)
        n_heads, n_keys = queries.shape[1], keys.shape[2]
        # the query heads of a group read the same key-value head
        keys = repeat(keys.to(dtype), "batch kv key d -> batch (kv group) key d", group=n_heads // keys.shape[1])
        seen = seen_keys(places, n_heads, n_keys, start[layer], end[layer], streaming[layer])
        scores = queries.to(dtype) @ keys.transpose(2, 3) * scale[layer]  # [batch head query key]
        pattern = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        # the softmax of a row of minus infinities is NaN
        pattern = torch.where(seen.any(-1, keepdim=True), pattern, 0.0)
        weights = rearrange(weight, "batch query -> batch 1 query 1").to(dtype)
        profiles.append((pattern * weights).sum(2))  # -> [batch head key]
    return torch.stack(profiles)

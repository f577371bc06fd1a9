"""Blocks of keys represented by one vector each: their mean, the corners of their bounding box, or one key."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

#: how keys outside the sink and the window are summed over
KEYS = ("exact", "mean", "bound", "sample")


def over_blocks(
    keys: Float[Tensor, "batch kv_head key d_head"], block: int, reduce: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch kv_head block d_head"]:
    """`reduce` of each block `[... key d_head]` of `block` keys, the last one shorter, without a copy of the keys."""
    whole = keys.shape[2] // block * block
    parts = [reduce(keys[:, :, :whole].unflatten(2, (-1, block)))] if whole else []
    if whole < keys.shape[2]:
        parts.append(reduce(keys[:, :, None, whole:]))
    return torch.cat(parts, dim=2)


def block_scores(
    score: Callable[[Tensor, Tensor], Tensor],
    q: Float[Tensor, "batch head row d_head"],
    keys: Float[Tensor, "batch kv_head key d_head"],
    how: str,
    block: int,
) -> tuple[Float[Tensor, "batch head row block"], Float[Tensor, " block"]]:
    """The score that represents the keys of each block, and the logarithm of their number; of each key, if exact.

    `score` computes scores of queries `[batch head row d_head]` and keys `[batch kv_head key d_head]`.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    n = keys.shape[2]
    if how == "exact":
        return score(q, keys), torch.zeros(n, dtype=wide, device=q.device)
    starts = torch.arange(0, n, block, device=q.device)
    count = (starts + block).clamp(max=n) - starts
    if how == "sample":
        values = score(q, keys.index_select(2, starts + (count - 1) // 2))
    elif how == "mean":
        values = score(q.to(wide), over_blocks(keys, block, lambda x: x.sum(3, dtype=wide) / x.shape[3]))
    else:  # the corner of the box that is farthest along q
        high, low = (
            over_blocks(keys, block, extreme).to(wide) for extreme in (lambda x: x.amax(3), lambda x: x.amin(3))
        )
        values = score(q.to(wide).clamp(min=0), high) + score(q.to(wide).clamp(max=0), low)
    return values, count.to(wide).log()

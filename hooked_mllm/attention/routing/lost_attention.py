"""The attention that a streaming head would lose: that of some queries to keys outside the sink and the window."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.row_statistics import attention_scores
from hooked_mllm.attention.streaming import CausalBounds, StreamingHeads
from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError

#: how keys outside the sink and the window are summed over
KEYS = ("exact", "mean", "bound", "sample")
#: bytes of scores that are in memory at once
MAX_BYTES = 1 << 28


@checked
@torch.no_grad()
def lost_attention(
    q: Float[Tensor, "batch head query d_head"], k: Float[Tensor, "batch kv_head key d_head"],
    mask: MaskRows, scale: float, *, sink: int, window: int,
    queries: int | Bool[Tensor, "mask_batch mask_query"] = 64, order: int = 1, keys: str = "exact", block: int = 64,
    max_bytes: int = MAX_BYTES,
) -> Float[Tensor, "batch head"]:  # fmt: skip
    r"""The attention of each head that falls outside its sink and window, mean over some queries Q.

    $$\lambda_h = \frac{1}{|Q|} \sum_{i \in Q} \Big(\sum_{j = \text{sink}}^{i - \text{window}}
    A_{ij}^p\Big)^{1/p},\qquad
    A_{ij} = \frac{e^{s\, q_i \cdot k_j}}{\sum_{j' \le i} e^{s\, q_i \cdot k_{j'}}}$$

    Of order p = 1 it is the lost mass. Of order 2 it is the length of the lost output if the lost values are unrelated
    vectors of one length: attention that is spread over many keys, whose values then cancel, counts little.

    Keys of the sink or of the window of any of the queries are summed one by one, the others in blocks of b:

    - "exact": one by one too. 2 H m N d operations for m queries.
    - "mean": `b exp(s q . mean(k))`, at most the block's sum (Jensen), so that the mass is at most the exact one. A
      score x above the others of its block raises the mean only by x / b.
    - "bound": `b exp(max of s q . k over the box around the block's keys)`, at least the block's sum, so that the mass
      is at least the exact one.
    - "sample": `b exp(s q . k)` for the key in the middle of the block, neither an upper nor a lower bound.

    The last three take 2 H m N d / b operations ("bound" twice that) and b times fewer scores. With 32 query and 8 key
    heads of 128, m = 64, N = 131,072, b = 64, a layer: 69 GFLOP and 1 GiB of scores (in pieces of `max_bytes`), or 1.1
    GFLOP and 16 MiB; dense causal attention of one head is 4,400 GFLOP.

    Args:
        q: Queries after position encoding.
        k: Keys after position encoding.
        mask: The model's mask, causal with padding at the ends if anywhere.
        scale: s.
        sink: First keys of the sequence that a streaming head sees.
        window: Last keys that it sees, the query's own included.
        queries: Q: a number of last tokens of each sequence, or a mask of queries.
        order: p, 1 or 2.
        keys: "exact", "mean", "bound" or "sample".
        block: b.
        max_bytes: Bytes of scores that are in memory at once.

    Returns:
        From 0 to 1, in float32 or wider; exactly 0 if sink and window contain all visible keys, or all is padding.

    Raises:
        InputError: For a setting out of range, or a mask of queries of another shape or without a query.
        UnsupportedModelError: For a mask that is not causal with padding at the ends.

    Source: last queries against all or pooled keys: arXiv:2407.02490, arXiv:2502.20766; the bound: arXiv:2406.10774.

    Examples:
        >>> q, k = torch.randn(1, 4, 100, 16), torch.randn(1, 2, 100, 16)
        >>> mask = MaskRows.causal_rows(batch=1, length=100, device="cpu")
        >>> lost_attention(q, k, mask, 0.25, sink=4, window=16, queries=8).shape
        torch.Size([1, 4])
        >>> float(lost_attention(q, k, mask, 0.25, sink=4, window=96, queries=8).sum())
        0.0
    """
    check_estimate(order, keys, block)
    bounds = mask.streamed(StreamingHeads((), q.shape[1], sink, window)).bounds()
    assert bounds is not None  # `streamed` raises for masks that have none
    settings = (scale, sink, window, order, keys, block, max_bytes)
    rows = _rows(queries, bounds, (q.shape[0], q.shape[2], k.shape[2]))
    if all(row == rows[0] for row in rows):
        return _lost(q, k, *rows[0], bounds.offset, *settings)
    parts = [_lost(q[i : i + 1], k[i : i + 1], *row, bounds.offset, *settings) for i, row in enumerate(rows)]
    return torch.cat(parts)


def check_estimate(order: int, keys: str, block: int) -> None:
    """Raise an `InputError` for settings of the estimate that are out of range."""
    if order not in (1, 2):
        raise InputError(f"Expected order to be 1 (the mass that is lost) or 2 (its length); got {order!r}.")
    if keys not in KEYS or block < 1:
        raise InputError(f"Expected keys to be one of {', '.join(KEYS)} and block >= 1; got {keys!r} and {block}.")


def _rows(
    queries: int | Tensor, bounds: CausalBounds, shape: tuple[int, int, int]
) -> list[tuple[tuple[int, ...], int]]:
    """The selected queries of each sequence, and its first key. Reads the padding from the device, if there is any."""
    batch, q_length, kv_length = shape
    start = [0] * batch if bounds.start is None else bounds.start.tolist()
    end = [kv_length] * batch if bounds.end is None else bounds.end.tolist()
    real = [(max(a - bounds.offset, 0), min(b - bounds.offset, q_length)) for a, b in zip(start, end, strict=True)]
    if isinstance(queries, int):
        if queries < 1:
            raise InputError(f"Expected at least one query to estimate from; got {queries}.")
        selected = [tuple(range(max(low, high - queries), high)) for low, high in real]
    else:
        if tuple(queries.shape) != (batch, q_length):
            raise InputError(
                f"The mask of queries is of shape {list(queries.shape)}, the prompt has {batch} x {q_length} queries "
                "[batch query]: a policy with a mask serves that prompt alone. For any prompt give a number of tokens."
            )
        positions = [np.flatnonzero(row).tolist() for row in queries.cpu().numpy()]
        selected = [tuple(i for i in p if low <= i < high) for p, (low, high) in zip(positions, real, strict=True)]
        if not all(row or low >= high for row, (low, high) in zip(selected, real, strict=True)):
            raise InputError("The mask of queries is empty for a sequence: expected one token of it at least.")
    return list(zip(selected, start, strict=True))


def _lost(
    q: Tensor, k: Tensor, rows: tuple[int, ...], start: int, offset: int,
    scale: float, sink: int, window: int, order: int, how: str, block: int, max_bytes: int,
) -> Float[Tensor, "batch head"]:  # fmt: skip
    """The lost attention of these queries, of sequences that begin at key `start`."""

    def score(left: Tensor, right: Tensor) -> Tensor:
        return attention_scores(left[None], [right], [scale])[0]

    wide: Any = torch.promote_types(q.dtype, torch.float32)
    if not rows:
        return q.new_zeros(q.shape[:2], dtype=wide)
    first, stop = rows[0] + offset, rows[-1] + offset + 1
    sink_end = min(start + sink, stop)
    tail = max(sink_end, first - window + 1)  # from here on, keys are in the window of some queries
    key = torch.cat((torch.arange(start, sink_end, device=q.device), torch.arange(tail, stop, device=q.device)))
    nearby = torch.cat((k[:, :, start:sink_end], k[:, :, tail:stop]), dim=2)

    def of(part: Tensor) -> Float[Tensor, "batch head query"]:
        queries, position = q.index_select(2, part), (part + offset)[:, None]
        scores = score(queries, nearby)
        far = (key >= sink_end) & (key <= position - window)
        total = scores.masked_fill(key > position, -torch.inf).logsumexp(-1)
        lost = (order * scores.masked_fill(~far, -torch.inf)).logsumexp(-1)
        step = max(1, max_bytes // (queries.shape[:3].numel() * scores.element_size()))
        step *= 1 if how == "exact" else block
        for low in range(sink_end, tail, step):
            scores, log_count = block_scores(score, queries, k[:, :, low : min(low + step, tail)], how, block)
            total = torch.logaddexp(total, (scores + log_count).logsumexp(-1))
            lost = torch.logaddexp(lost, (order * scores + log_count).logsumexp(-1))
        return (lost / order - total).exp().clamp(max=1)

    each = q.shape[0] * q.shape[1] * len(key) * torch.finfo(wide).bits // 8  # bytes of a query's nearby scores
    index = torch.tensor(rows, device=q.device)
    return torch.cat([of(part) for part in index.split(max(1, max_bytes // each))], dim=2).mean(-1)


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
    """The score that represents the keys of each block, and the logarithm of their number; of each key, if exact."""
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

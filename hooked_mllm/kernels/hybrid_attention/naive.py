"""The definition of hybrid attention and its gradients in plain torch, on any device."""

from collections.abc import Iterator

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.kernels.implementations import Bound, HeadFlags, Keys, Queries
from hooked_mllm.kernels.streaming_window import visible_keys_at


def visible_keys(
    dense: HeadFlags, q_length: int, kv_length: int, sink: int, window: int, start: Bound, end: Bound,
    offset: int | None = None,
) -> Bool[Tensor, "batch head query key"]:  # fmt: skip
    """The keys that each query of each head sees; see `visible_keys_at`.

    `dense` is True at dense heads; `offset` is the position of the first query, by default that of the last keys.
    """
    offset = kv_length - q_length if offset is None else offset
    positions = torch.arange(offset, offset + q_length, device=dense.device)[None]  # [1 query]
    return visible_keys_at(positions, kv_length, dense, sink, window, start, end)


def naive_hybrid_attention(
    q: Queries, k: Keys, v: Keys, dense: HeadFlags, sink: int, window: int, scale: float, start: Bound, end: Bound,
    chunk: int = 1024,
) -> tuple[Queries, Float[Tensor, "batch head query"]]:  # fmt: skip
    """Hybrid attention and the log-sum-exp of its scores; queries without visible keys have 0 and minus infinity.

    Computed in float32 or wider, `chunk` queries at a time.
    """
    keys, values = _per_query_head(q, k, v)
    z, lse = [], []
    for _, _, pattern, chunk_lse in _patterns(q, keys, dense, sink, window, scale, start, end, chunk):
        z.append((pattern @ values).to(q.dtype))
        lse.append(chunk_lse)
    return torch.cat(z, dim=2), torch.cat(lse, dim=2)


def _per_query_head(q: Queries, k: Keys, v: Keys) -> list[Float[Tensor, "batch head key d_head"]]:
    """Keys and values in float32 or wider, copied for every query head of a group."""
    dtype, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    return [repeat(x.to(dtype), "batch kv key d -> batch (kv group) key d", group=group) for x in (k, v)]


def query_major(z: Float[Tensor, "batch head query d_head"]) -> Float[Tensor, "batch head query d_head"]:
    """The same values, contiguous as `[batch query head d_head]`: what the output projection reads."""
    return z.transpose(1, 2).contiguous().transpose(1, 2)


def _patterns(
    q: Queries, keys: Float[Tensor, "batch head key d_head"], dense: HeadFlags, sink: int, window: int, scale: float,
    start: Bound, end: Bound, chunk: int,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Chunks of queries: their slice, the queries, their pattern `[batch head query key]` and log-sum-exp."""
    for low in range(0, q.shape[2], chunk):
        part = slice(low, low + chunk)
        queries = q[:, :, part].to(keys.dtype)
        offset = low + keys.shape[2] - q.shape[2]  # the last query is at the last key
        seen = visible_keys(dense.to(q.device), queries.shape[2], keys.shape[2], sink, window, start, end, offset)
        scores = (queries @ keys.transpose(2, 3) * scale).masked_fill_(~seen, -torch.inf)
        empty = ~seen.any(-1, keepdim=True)  # the softmax of such a row would be NaN
        lse = scores.logsumexp(-1)
        pattern = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        del scores, seen, empty  # large: not kept while the caller computes
        yield part, queries, pattern, lse


def naive_gradients(
    q: Queries, k: Keys, v: Keys, dense: HeadFlags, sink: int, window: int, scale: float, start: Bound, end: Bound,
    dz: Queries | None, dlse: Float[Tensor, "batch head query"] | None = None, chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r"""The gradients of `naive_hybrid_attention`, written out: they need the memory of `chunk` rows, autograd all.

    With $P = \mathrm{softmax}(s\,QK^\top)$ and $dP = dZ\,V^\top$: $dV = P^\top dZ$, $dS = P \circ (dP -
    \mathrm{rowsum}(P \circ dP) + d\,\mathrm{lse})$, $dQ = s\,dS\,K$, $dK = s\,dS^\top Q$; in float32 or wider.
    """
    keys, values = _per_query_head(q, k, v)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for part, queries, pattern, _ in _patterns(q, keys, dense, sink, window, scale, start, end, chunk):
        inner = torch.zeros_like(pattern)  # dP - rowsum(P * dP) + dlse: [batch head query key]
        if dz is not None:
            dz_part = dz[:, :, part].to(keys.dtype)
            dv += pattern.transpose(2, 3) @ dz_part
            inner = dz_part @ values.transpose(2, 3)
            inner -= (pattern * inner).sum(-1, keepdim=True)
        if dlse is not None:
            inner += rearrange(dlse[:, :, part].to(keys.dtype), "batch head query -> batch head query 1")
        dscores = pattern * inner * scale
        dq[:, :, part] = (dscores @ keys).to(q.dtype)
        dk += dscores.transpose(2, 3) @ queries
    # the gradient of a shared key-value head is the sum over the query heads of its group
    group_sum = "batch (kv group) key d -> batch kv key d"
    dk, dv = (reduce(x, group_sum, "sum", kv=k.shape[1]).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv

"""The definition of hybrid attention and its gradients in plain torch, on any device."""

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.kernels.streaming_window import visible_keys_at


def visible_keys(
    dense: Bool[Tensor, " head"],
    q_length: int,
    kv_length: int,
    sink: int,
    window: int,
    start: Int[Tensor, " batch"],
    end: Int[Tensor, " batch"],
    offset: int | None = None,
) -> Bool[Tensor, "batch head query key"]:
    r"""The keys that each query of each head sees; see `visible_keys_at`.

    Args:
        dense: True at the dense heads.
        q_length: Number of queries.
        kv_length: Number of keys.
        sink: First keys that the other heads see.
        window: Last keys that they see, the query's own included.
        start: The first real key of each sequence.
        end: One past its last real key.
        offset: Position of the first query; by default that which puts the last query at the last key.
    """
    offset = kv_length - q_length if offset is None else offset
    positions = torch.arange(offset, offset + q_length, device=dense.device)[None]  # [1 query]
    return visible_keys_at(positions, kv_length, dense, sink, window, start, end)


def naive_hybrid_attention(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    dense: Bool[Tensor, " head"],
    sink: int,
    window: int,
    scale: float,
    start: Int[Tensor, " batch"],
    end: Int[Tensor, " batch"],
    chunk: int = 1024,
) -> tuple[Float[Tensor, "batch head query d_head"], Float[Tensor, "batch head query"]]:
    """Hybrid attention and the log-sum-exp of its scores; queries without visible keys have 0 and minus infinity.

    Computed in float32 or wider, `chunk` queries at a time.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (_per_query_head(x.to(dtype), q.shape[1]) for x in (k, v))
    z, lse = [], []
    for low in range(0, q.shape[2], chunk):
        queries = q[:, :, low : low + chunk].to(dtype)
        offset = low + k.shape[2] - q.shape[2]  # the last query is at the last key
        pattern, chunk_lse = _pattern(queries, keys, dense, offset, sink, window, scale, start, end)
        z.append((pattern @ values).to(q.dtype))
        lse.append(chunk_lse)
    return torch.cat(z, dim=2), torch.cat(lse, dim=2)


def _per_query_head(
    x: Float[Tensor, "batch kv_head key d_head"], n_heads: int
) -> Float[Tensor, "batch head key d_head"]:
    """Keys or values, copied for every query head of a group."""
    return repeat(x, "batch kv key d -> batch (kv group) key d", group=n_heads // x.shape[1])


def query_major(z: Float[Tensor, "batch head query d_head"]) -> Float[Tensor, "batch head query d_head"]:
    """The same values, contiguous as `[batch query head d_head]`: what the output projection reads."""
    return z.transpose(1, 2).contiguous().transpose(1, 2)


def _pattern(
    q: Float[Tensor, "batch head query d_head"],
    keys: Float[Tensor, "batch head key d_head"],
    dense: Bool[Tensor, " head"],
    offset: int,
    sink: int,
    window: int,
    scale: float,
    start: Int[Tensor, " batch"],
    end: Int[Tensor, " batch"],
) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query"]]:
    """Attention weights of queries from position `offset` on, and the log-sum-exp of their scores."""
    seen = visible_keys(dense.to(q.device), q.shape[2], keys.shape[2], sink, window, start, end, offset)
    scores = (q @ keys.transpose(2, 3) * scale).masked_fill_(~seen, -torch.inf)
    empty = ~seen.any(-1, keepdim=True)  # the softmax of such a row would be NaN
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0), scores.logsumexp(-1)


def naive_gradients(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_head"],
    dense: Bool[Tensor, " head"],
    sink: int,
    window: int,
    scale: float,
    start: Int[Tensor, " batch"],
    end: Int[Tensor, " batch"],
    dz: Float[Tensor, "batch head query d_head"] | None,
    dlse: Float[Tensor, "batch head query"] | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The gradients of `naive_hybrid_attention`, written out: they need the memory of `chunk` rows, autograd all.

    With $P = \mathrm{softmax}(s\,QK^\top)$ and $dP = dZ\,V^\top$: $dV = P^\top dZ$, $dS = P \circ (dP -
    \mathrm{rowsum}(P \circ dP) + d\,\mathrm{lse})$, $dQ = s\,dS\,K$, $dK = s\,dS^\top Q$; in float32 or wider.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = (_per_query_head(x.to(dtype), q.shape[1]) for x in (k, v))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for low in range(0, q.shape[2], chunk):
        part = slice(low, low + chunk)
        queries = q[:, :, part].to(dtype)
        offset = low + k.shape[2] - q.shape[2]
        pattern, _ = _pattern(queries, keys, dense, offset, sink, window, scale, start, end)
        inner = torch.zeros_like(pattern)  # dP - rowsum(P * dP) + dlse: [batch head query key]
        if dz is not None:
            dz_part = dz[:, :, part].to(dtype)
            dv += pattern.transpose(2, 3) @ dz_part
            inner = dz_part @ values.transpose(2, 3)
            inner -= (pattern * inner).sum(-1, keepdim=True)
        if dlse is not None:
            inner += rearrange(dlse[:, :, part].to(dtype), "batch head query -> batch head query 1")
        dscores = pattern * inner * scale
        dq[:, :, part] = (dscores @ keys).to(q.dtype)
        dk += dscores.transpose(2, 3) @ queries
    # the gradient of a shared key-value head is the sum over the query heads of its group
    group_sum = "batch (kv group) key d -> batch kv key d"
    dk, dv = (reduce(x, group_sum, "sum", kv=k.shape[1]).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv

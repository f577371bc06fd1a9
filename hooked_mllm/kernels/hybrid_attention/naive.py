"""The definition of hybrid attention, in plain torch: for any device, and for gradients."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    r"""Which keys each query of each head sees.

    Query i stands at position p = i + offset, by default i + kv_length - q_length, and sees key j iff
    `start <= j < end`, `j <= p`, and, unless the head is dense, `j < start + sink` or `j > p - window`.
    """
    key = torch.arange(kv_length, device=dense.device)
    offset = kv_length - q_length if offset is None else offset
    place = torch.arange(q_length, device=dense.device)[:, None] + offset
    first, last = (x.to(dense.device)[:, None, None] for x in (start, end))
    causal = (key <= place) & (key >= first) & (key < last)
    near = (key > place - window) | (key < first + sink)
    return causal[:, None] & (near[:, None] | dense[None, :, None, None])


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
    """Hybrid attention and the log-sum-exp of its scores; rows that see nothing are 0 and minus infinity.

    Computed in float32 at least, `chunk` queries at a time.
    """
    groups, q_length, kv_length = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    dense = dense.to(q.device)
    out, lse = [], []
    for low in range(0, q_length, chunk):
        part = q[:, :, low : low + chunk].to(wide)
        offset = low + kv_length - q_length
        seen = visible_keys(dense, part.shape[2], kv_length, sink, window, start, end, offset)
        scores = (part @ keys.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
        total = scores.logsumexp(-1)
        blind = ~seen.any(-1, keepdim=True)
        weights = torch.where(blind, 0.0, scores.masked_fill(blind, 0.0).softmax(-1))  # no NaN, nor in a gradient
        out.append((weights @ values).to(q.dtype))
        lse.append(total)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)

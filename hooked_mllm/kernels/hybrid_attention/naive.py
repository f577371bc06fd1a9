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
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(wide).repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out, lse = [], []
    for low in range(0, q.shape[2], chunk):
        part = q[:, :, low : low + chunk].to(wide)
        weights, total = _weights(part, keys, dense, low - q.shape[2], sink, window, scale, start, end)
        out.append((weights @ values).to(q.dtype))
        lse.append(total)
    return torch.cat(out, dim=2), torch.cat(lse, dim=2)


def _weights(
    q: Tensor,
    keys: Tensor,
    dense: Tensor,
    before_end: int,
    sink: int,
    window: int,
    scale: float,
    start: Tensor,
    end: Tensor,
) -> tuple[Tensor, Tensor]:
    """Softmax weights of queries, the first of which stands `-before_end` keys before the end, and the log-sum-exp."""
    n_keys = keys.shape[2]
    seen = visible_keys(dense.to(q.device), q.shape[2], n_keys, sink, window, start, end, n_keys + before_end)
    scores = (q @ keys.transpose(2, 3) * scale).masked_fill_(~seen, -torch.inf)
    blind = ~seen.any(-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0), scores.logsumexp(-1)


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
    r"""The gradients of `naive_hybrid_attention`, written out, for they need no more memory than `chunk` rows.

    With $P = \mathrm{softmax}(s\,QK^\top)$ and $dP = dZ\,V^\top$: $dV = P^\top dZ$, $dS = P \circ (dP -
    \mathrm{rowsum}(P \circ dP) + d\,\mathrm{lse})$, $dQ = s\,dS\,K$, $dK = s\,dS^\top Q$; in float32 at least.
    """
    groups, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(wide).repeat_interleave(groups, dim=1) for x in (k, v))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    for low in range(0, q.shape[2], chunk):
        part = slice(low, low + chunk)
        queries = q[:, :, part].to(wide)
        weights, _ = _weights(queries, keys, dense, low - q.shape[2], sink, window, scale, start, end)
        inner = torch.zeros_like(weights)
        if dz is not None:
            dout = dz[:, :, part].to(wide)
            dv += weights.transpose(2, 3) @ dout
            inner = dout @ values.transpose(2, 3)
            inner -= (weights * inner).sum(-1, keepdim=True)
        if dlse is not None:
            inner += dlse[:, :, part, None].to(wide)
        dscores = weights * inner * scale
        dq[:, :, part] = (dscores @ keys).to(q.dtype)
        dk += dscores.transpose(2, 3) @ queries
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv

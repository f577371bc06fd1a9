"""The maths of attention rows, in float32 or wider: softmax rows, their mean, their mass, their largest keys.

Axes: `head` (query heads), `query` (the selected query tokens), `key` (all positions).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.kernels.attention_profile import has_triton
from hooked_mllm.kernels.implementations import Keys

_HALF = (torch.bfloat16, torch.float16)
#: numbers in the keys of one layer from which on a product per layer costs less than copying all keys together
_COPY_BELOW = 1 << 22


def attention_scores(
    q: Float[Tensor, "layer batch head query d_head"], k: Sequence[Keys], scale: Sequence[float]
) -> Float[Tensor, "layer batch head query key"]:
    """`scale * q k^T` with products summed in float32 (float64 for float64 operands), k not expanded to all heads."""
    n_layers, batch, heads, queries, d_head = q.shape
    kv_heads, keys = k[0].shape[1:3]
    # one matrix product per key head: the query heads that share it are rows of the same left operand
    left = q.reshape(n_layers, batch * kv_heads, heads // kv_heads * queries, d_head)
    scores = left.new_empty(*left.shape[:3], keys, dtype=torch.float32 if q.dtype in _HALF else q.dtype)
    if n_layers > 1 and k[0].numel() < _COPY_BELOW and len(set(scale)) == 1:
        right = torch.cat(list(k)).view(-1, keys, d_head)
        _product(left.flatten(0, 1), right, scale[0], scores.view(-1, *scores.shape[2:]))
    else:
        for layer in range(n_layers):
            _product(left[layer], k[layer].reshape(-1, keys, d_head), scale[layer], scores[layer])
    return scores.view(n_layers, batch, heads, queries, keys)


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> None:
    """Write `scale * left right^T` into `out`."""
    wide: dict[str, Any] = {}
    if left.dtype in _HALF and left.is_cuda:
        wide = {"out_dtype": torch.float32}
    elif left.dtype in _HALF:
        left, right = left.float(), right.float()
    # with beta = 0 the product includes the scale and `out` is only written: one pass over memory less
    torch.baddbmm(out, left, right.transpose(1, 2), beta=0, alpha=scale, out=out, **wide)


def attention_rows(
    q: Float[Tensor, "layer batch head query d_head"], k: Sequence[Keys], scale: Sequence[float],
    hidden: Bool[Tensor, "mask_layer batch mask_head query tail"],
) -> Float[Tensor, "layer batch head query key"]:  # fmt: skip
    """`A[i, j] = softmax_j(scale * q_i k_j)` over the keys that are not hidden, zero elsewhere.

    `hidden` is True where the query does not see one of the last `tail` keys; all see the keys before. A row without
    visible keys is uniform (finite), for the caller to discard.
    """
    scores = attention_scores(q, k, scale)
    tail = hidden.shape[-1]
    # the lowest finite number, not -inf: a row of padding would turn into NaN
    lowest = torch.finfo(scores.dtype).min
    scores.narrow(-1, scores.shape[-1] - tail, tail).masked_fill_(hidden, lowest)
    return torch.softmax(scores, dim=-1)


def key_mass(
    profile: Float[Tensor, "layer batch head key"], keys: Bool[Tensor, "batch key"]
) -> Float[Tensor, "layer batch head"]:
    """`sum_{j in K} a[j]`, summed in float64."""
    return (profile * keys[:, None]).sum(-1, dtype=torch.float64)


def first_largest(values: Float[Tensor, "*axes item"], rounding: float = 1e-5) -> Int[Tensor, "*axes"]:
    """The first index of a largest value (0 or more) of the last axis, up to relative `rounding`."""
    least = values.amax(-1, keepdim=True) * (1 - rounding)
    return (values >= least).to(torch.uint8).argmax(-1)  # the first of equal numbers


def top_mask(
    values: Float[Tensor, "*axes item"],
    k: Int[Tensor, "*k_axes"] | int,
    k_max: int | None = None,
    rounding: float = 0.0,
) -> Bool[Tensor, "*axes item"]:
    """True at the `k` largest values of the last axis; among equal values the lower index comes first.

    Values that differ from the k-th largest by less than `rounding` times its size are equal to it. One launch of a
    Triton kernel on a GPU where it fits. `k_max`, the largest k, avoids a wait for the device.
    """
    fits = not rounding and values.dim() == 4 and values.dtype == torch.float32 and values.is_contiguous()
    if values.is_cuda and fits and has_triton():
        from hooked_mllm.kernels.attention_profile.largest import LONGEST, triton_top_mask  # needs a GPU's compiler

        if values.shape[-1] <= LONGEST:
            return triton_top_mask(values, k)
    if isinstance(k, int):
        threshold = values.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        room: Tensor | int = k
    else:
        largest = values.topk(k_max or values.shape[-1], dim=-1).values
        threshold = largest.gather(-1, (k - 1).expand(values.shape[:-1])[..., None])
        room = k[..., None]
    margin = (threshold.abs() * rounding).nan_to_num(posinf=0.0)  # of an infinite threshold, too
    above = values > threshold + margin
    ties = (values >= threshold - margin) & ~above
    room = room - above.sum(-1, keepdim=True)
    # ties at the threshold are filled from the left until there is no room
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= room))


def chance_level(
    visible: Bool[Tensor, "batch mask_head query key"],
    keys: Bool[Tensor, "batch key"],
    weight: Float[Tensor, "batch query"],
) -> Float[Tensor, "batch mask_head"]:
    """The mass on K of a head with uniform attention: mean over the queries of |K visible| / |visible|."""
    seen = visible.sum(-1)
    hit = (visible & keys[:, None, None]).sum(-1)
    return (hit / seen.clamp(min=1) * weight[:, None]).sum(-1, dtype=torch.float64)


def counted_chance(
    places: Int[Tensor, "batch query"], keys: Bool[Tensor, "batch key"], weight: Float[Tensor, "batch query"],
    start: Int[Tensor, " batch"] | None, end: Int[Tensor, " batch"] | None, near: tuple[int, int] | None = None,
) -> Float[Tensor, " batch"]:  # fmt: skip
    """`chance_level` under a causal mask in numbers (see `CausalBounds`); `near`: sink, window of a streaming head."""
    before = torch.nn.functional.pad(keys.cumsum(1), (1, 0))  # keys of K before each position
    first = torch.zeros_like(places) if start is None else start.to(places)[:, None].expand_as(places)
    stop = places + 1 if end is None else torch.minimum(places + 1, end.to(places)[:, None])
    sink_end = low = first
    if near is not None:
        sink_end = torch.minimum(first + near[0], stop)
        low = torch.maximum(places + 1 - near[1], sink_end).minimum(stop)
    seen = stop - low + sink_end - first
    hit = sum(before.gather(1, x) * sign for x, sign in ((stop, 1), (low, -1), (sink_end, 1), (first, -1)))
    return (hit / seen.clamp(min=1) * weight).sum(-1, dtype=torch.float64)


def first_rank(
    top: Bool[Tensor, "layer batch head key"], ranks: Int[Tensor, "layer head"], n: int
) -> Int[Tensor, "batch key"]:
    """The lowest rank among the heads that have each key in their top set; `n` where none has it."""
    return torch.where(top, ranks[:, None, :, None], n).amin((0, 2))  # [layer batch head key] -> [batch key]


def coverage_by_rank(
    best: Int[Tensor, "batch key"], target: Bool[Tensor, "batch key"], n: int
) -> Float[Tensor, "batch k"]:
    """The share of the target keys whose best rank is below k, for k = 0 .. n (arXiv:2606.05843 eq. 24, 25)."""
    # a key of rank r is covered from k = r + 1 on; rank n, never
    arrivals = torch.zeros(best.shape[0], n + 2, dtype=torch.float64, device=best.device)
    arrivals.scatter_add_(1, best.long() + 1, target.double())
    return arrivals.cumsum(1)[:, : n + 1] / target.sum(1, keepdim=True)

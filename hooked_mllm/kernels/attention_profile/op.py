"""`attention_profile`: the public function, its checks, and the choice of its implementation."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.kernels.attention_profile.naive import Streaming as Streaming
from hooked_mllm.kernels.attention_profile.naive import naive_attention_profile
from hooked_mllm.kernels.implementations import (
    Implementation,
    Keys,
    Queries,
    check_implementation,
    check_triton,
    kernel_fits,
    kernel_runs,
)
from hooked_mllm.kernels.streaming_window import check_sink_and_window


def attention_profile(
    q: Sequence[Queries], k: Sequence[Keys], places: Int[Tensor, "batch query"], *,
    weight: Float[Tensor, "batch query"] | None = None, scale: float | Sequence[float] | None = None,
    start: Int[Tensor, "*layer batch"] | None = None, end: Int[Tensor, "*layer batch"] | None = None,
    streaming: Sequence[Streaming | None] | None = None, implementation: Implementation = "auto",
) -> Float[Tensor, "layer batch head key"]:  # fmt: skip
    r"""The mean attention row over selected queries, of several layers at once, without the rows in memory.

    $$a[j] = \sum_{i\in Q} w_i\, \mathrm{softmax}_j\big(s\, q_i \cdot k_j\big),\qquad w_i = 1/|Q|$$

    over the keys that each query sees: `start <= j <= p`, `j < end` for a query at position p; in a streaming head,
    of these only `j < start + sink` and `j > p - window`. Computed in float32. A query without visible keys counts as
    0; NaN or infinity in visible q or k makes the whole profile of that head NaN. The sum of $a$ over a set of keys is
    the attention mass on that set. On a GPU, two launches of Triton kernels for all layers.

    Args:
        q: The selected queries after position encoding, `[batch head query d_head]` per layer; all of one shape.
        k: All keys after position encoding, `[batch kv_head key d_head]` per layer, likewise.
        places: The position of each query among the keys.
        weight: The weights w; 0 pads samples with fewer queries. 1/query by default.
        scale: The factor s, one for all layers or one for each; 1/sqrt(d_head) by default. Above 0.
        start: The first real key of each sequence, for all layers or by layer.
        end: One past its last real key.
        streaming: For each layer None, or (dense heads, sink, window).
        implementation: "auto", "triton" or "naive", which is the definition in torch, with all rows in memory.

    Raises:
        InputError: For shapes, dtypes or devices that do not fit, or numbers out of range.
        HeadError: For a dense head that q does not have.
        HookValueError: For an unknown implementation, or "triton" where it cannot run.

    Source: arXiv:2606.05843 eq. 22.

    Examples:
        >>> import torch
        >>> q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 100, 16)
        >>> profile = attention_profile([q], [k], torch.tensor([[97, 98, 99]]))
        >>> profile.shape, round(profile.sum().item(), 4)
        (torch.Size([1, 1, 4, 100]), 4.0)
    """
    n_layers, batch, n_keys = _check(q, k, places, implementation)
    scales = [scale] * n_layers if scale is None or isinstance(scale, float | int) else list(scale)
    scales = [q[0].shape[-1] ** -0.5 if s is None else float(s) for s in scales]
    heads = list(streaming or [None] * n_layers)
    if len(scales) != n_layers or len(heads) != n_layers:
        raise InputError(f"Expected one scale and one kind of heads for each of {n_layers} layers.")
    if not all(s > 0 for s in scales):
        raise InputError(f"A scale is above 0; got {scales}.")
    n_heads = q[0].shape[1]
    for item in heads:
        if item is not None and any(not 0 <= head < n_heads for head in item[0]):
            raise HeadError(f"Dense heads {list(item[0])} are out of range: q has heads 0 to {n_heads - 1}.")
    heads = [None if item is None else (item[0], *check_sink_and_window(*item[1:])) for item in heads]
    for name, bound in (("start", start), ("end", end)):
        if bound is not None and tuple(bound.shape) not in ((batch,), (n_layers, batch)):
            raise InputError(f"`{name}` is [{batch}] or [{n_layers}, {batch}]; got {list(bound.shape)}.")
    weight = torch.full_like(places, 1 / places.shape[1], dtype=torch.float32) if weight is None else weight
    if weight.shape != places.shape:
        raise InputError(f"`weight` is of the shape of `places`, {list(places.shape)}; got {list(weight.shape)}.")
    fits = kernel_fits(q[0].shape[-1], q[0].dtype)
    if implementation == "naive" or (implementation == "auto" and not (q[0].is_cuda and fits)):
        start = places.new_zeros(batch) if start is None else start
        end = places.new_full((batch,), n_keys) if end is None else end
        start, end = (bound.expand(n_layers, batch) for bound in (start, end))
        return naive_attention_profile(q, k, scales, places, weight, start, end, heads)
    check_triton(q[0], fits, kernel_runs(q[0].device))
    from hooked_mllm.kernels.attention_profile.launch import triton_attention_profile  # imports Triton

    return triton_attention_profile(q, k, scales, places, weight, start, end, heads)


def _check(
    q: Sequence[Tensor], k: Sequence[Tensor], places: Int[Tensor, "batch query"], implementation: Implementation
) -> tuple[int, int, int]:
    """Check shapes, dtypes and devices; the numbers of layers, sequences and keys."""
    if not q or len(q) != len(k):
        raise InputError(f"Expected q and k of the same one or more layers; got {len(q)} and {len(k)}.")
    a, b = q[0], k[0]
    if a.dim() != 4 or b.dim() != 4 or a.shape[0] != b.shape[0] or a.shape[3] != b.shape[3] or a.shape[1] % b.shape[1]:
        raise InputError(
            "Expected q [batch head query d_head] and k [batch kv_head key d_head], head a multiple of kv_head; got "
            f"{list(a.shape)} and {list(b.shape)}."
        )
    for tensors, like in ((q, a), (k, b)):
        for tensor in tensors:
            if tensor.shape != like.shape or tensor.dtype != a.dtype or tensor.device != a.device:
                raise InputError("All layers have one shape, and all of q and k one dtype and one device.")
    if tuple(places.shape) != (a.shape[0], a.shape[2]) or 0 in (*a.shape, *b.shape):
        raise InputError(f"`places` is [batch query] of q, {[a.shape[0], a.shape[2]]}; got {list(places.shape)}.")
    check_implementation(implementation)
    return len(q), b.shape[0], b.shape[2]

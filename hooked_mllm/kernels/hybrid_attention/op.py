"""`hybrid_attention`: the public op, its registration with torch, and the choice of its implementation."""

import math
import operator
import warnings
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.kernels.hybrid_attention.naive import naive_gradients, naive_hybrid_attention, query_major
from hooked_mllm.kernels.implementations import (
    Bound,
    Implementation,
    Keys,
    Queries,
    check_implementation,
    check_triton,
    current_device,
    supported,
)
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window, head_flags

#: from this number of queries on, SDPA computes dense heads (measured on an H200; below, one launch for all is faster)
SDPA_FROM = 24576
#: how the op runs: the definition, one launch for all heads, or dense heads by SDPA
Route = Literal["naive", "triton", "sdpa"]
_noticed: set[str] = set()


@overload
def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, dense: Iterable[int], *, sink: WholeNumber = 64, window: WholeNumber = 1024,
    scale: float | None = None, start: Tensor | None = None, end: Tensor | None = None,
    return_lse: Literal[False] = False, implementation: Implementation = "auto", causal: bool = True,
) -> Tensor: ...  # fmt: skip


@overload
def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, dense: Iterable[int], *, sink: WholeNumber = 64, window: WholeNumber = 1024,
    scale: float | None = None, start: Tensor | None = None, end: Tensor | None = None,
    return_lse: Literal[True], implementation: Implementation = "auto", causal: bool = True,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def hybrid_attention(
    q: Queries, k: Keys, v: Keys, dense: Iterable[int], *, sink: WholeNumber = 64, window: WholeNumber = 1024,
    scale: float | None = None, start: Bound | None = None, end: Bound | None = None,
    return_lse: bool = False, implementation: Implementation = "auto", causal: bool = True,
) -> Any:  # fmt: skip
    r"""Causal attention in which some heads see everything before them and the others a sink and a window.

    $$z_i = \sum_{j \in V_h(i)} \mathrm{softmax}_j\big(s\, q_i \cdot k_j\big) v_j,\qquad
    V_h(i) = \{j \le i\} \text{ or } \{j \le i : j < \text{sink or } j > i - \text{window}\}$$

    With more keys than queries, the last query is at the last key (a chunk of a prompt and its cache). Inputs may have
    any strides; the result is contiguous as `[batch query head d_head]`. Queries without visible keys have z = 0.

    "auto" selects the Triton kernels on a GPU, with torch's SDPA for dense heads from 24,576 queries on, and where all
    heads are dense. Elsewhere, and for inputs that the kernels do not support, the torch definition runs, with a
    warning. Gradients are those of the definition, with the memory of chunks of N x N scores.

    Args:
        q: Queries after position encoding, `[batch head query d_head]`.
        k: Keys, `[batch kv_head key d_head]`; query head h reads key-value head h // (H / H_kv).
        v: Values, likewise.
        dense: Query heads that see everything before them.
        sink: First keys that the other heads see.
        window: Last keys that they see, the query's own included.
        scale: The factor s, above 0; 1/sqrt(d_head) by default.
        start: The first real key of each sequence (left padding before it).
        end: One past the last real key (right padding from it on).
        return_lse: Also return the log-sum-exp of each row's scores, float32 `[batch head query]`.
        implementation: "auto", "triton" or "naive".
        causal: Must be True: other attention is not supported.

    Raises:
        InputError: For shapes, dtypes or devices that do not fit, numbers out of range, or `causal=False`.
        HeadError: For a head that q does not have.
        HookValueError: For an unknown implementation, or "triton" where it cannot run.

    Source: arXiv:2606.05843, algorithm 3; streaming heads: arXiv:2309.17453, arXiv:2410.10819.

    Examples:
        >>> q, k, v = (torch.randn(1, heads, 100, 16) for heads in (4, 2, 2))
        >>> hybrid_attention(q, k, v, dense=[0, 3], sink=4, window=16, implementation="naive").shape
        torch.Size([1, 4, 100, 16])
    """
    if not causal:
        raise InputError(
            "hybrid_attention is causal: sinks and windows are defined from left to right. For bidirectional attention "
            "use torch.nn.functional.scaled_dot_product_attention."
        )
    q, k, v = as_autocast(q, k, v)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    heads = _check(q, k, v, dense, factor, start, end, implementation)
    sink, window = check_sink_and_window(sink, window)
    route = _select_route(implementation, q, len(heads))
    z, lse = torch.ops.hooked_mllm.hybrid_attention(q, k, v, heads, sink, window, factor, start, end, return_lse, route)
    return (z, lse) if return_lse else z


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v as `torch.autocast` does for torch's own attention; unchanged where autocast is off."""
    device_type = q.device.type
    if not torch.is_autocast_enabled(device_type) or q.dtype == torch.float64:
        return q, k, v
    dtype = torch.get_autocast_dtype(device_type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check(
    q: Tensor, k: Tensor, v: Tensor, dense: Iterable[int], scale: float, start: Tensor | None, end: Tensor | None,
    implementation: Implementation,
) -> list[int]:  # fmt: skip
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise InputError(
            "Expected q [batch head query d_head] and k, v [batch kv_head key d_head]; got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1] or 0 in (*q.shape, *k.shape):
        raise InputError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or width, or heads do not divide.")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or len({q.device, k.device, v.device}) > 1:
        raise InputError(
            f"q, k and v must have one dtype and one device; got {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, "
            f"{k.device}, {v.device}."
        )
    if not q.dtype.is_floating_point:
        raise InputError(f"q, k and v must contain floating-point numbers; got {q.dtype}.")
    if not 0 < scale < math.inf:
        raise InputError(f"scale must be a number above 0; got {scale}.")
    for name, bound in (("start", start), ("end", end)):
        if bound is not None and bound.shape != (q.shape[0],):
            raise InputError(f"`{name}` is one number per sequence, [{q.shape[0]}]; got {tuple(bound.shape)}.")
        if bound is not None and (bound.dtype.is_floating_point or bound.dtype == torch.bool):
            raise InputError(f"`{name}` is a position and must contain integers; got {bound.dtype}.")
    check_implementation(implementation)
    return head_numbers(dense, q.shape[1])


def head_numbers(dense: object, n_heads: int) -> list[int]:
    """Query heads in order, each once; anything but numbers from 0 to `n_heads` - 1 raises a `HeadError`."""
    numbers = list(dense) if isinstance(dense, Iterable) and getattr(dense, "ndim", 1) == 1 else None
    if numbers is not None and not all(type(number) is int for number in numbers):  # torch.compile traces only ints
        integers = all(hasattr(n, "__index__") and "bool" not in str(getattr(n, "dtype", type(n))) for n in numbers)
        floats = any(isinstance(number, Tensor) and number.is_floating_point() for number in numbers)
        numbers = [operator.index(n) for n in numbers] if integers and not floats else None
    if numbers is None:
        raise HeadError(
            f"Expected numbers of query heads from 0 to {n_heads - 1}, such as (0, 5); got {dense!r}. For a mask, use "
            "`mask.nonzero().flatten()`."
        )
    heads = sorted(set(numbers))
    if heads and not 0 <= heads[0] <= heads[-1] < n_heads:
        raise HeadError(
            f"Dense heads {heads} are out of range: q has heads 0 to {n_heads - 1}. Do they belong to another model?"
        )
    return heads


def _select_route(implementation: Implementation, q: Tensor, n_dense: int) -> Route:
    fits = supported(q.shape[-1], q.dtype)
    if implementation == "naive":
        return "naive"
    if implementation == "triton":
        check_triton(q, fits, q.is_cuda)
        return "triton"
    if q.is_cuda and fits:
        by_sdpa = q.dtype != torch.float32 and (q.shape[2] >= SDPA_FROM or n_dense == q.shape[1])
        return "sdpa" if by_sdpa else "triton"
    why = f"head dim {q.shape[-1]}, {q.dtype}" if q.is_cuda else f"on {q.device.type}"
    if why not in _noticed and not torch.compiler.is_compiling():
        _noticed.add(why)
        warnings.warn(f"hybrid_attention runs its torch definition ({why}): correct, but slow.", stacklevel=3)
    return "naive"


# tables of heads are cached between calls and must not be allocated in the memory pool of a CUDA graph, which
# torch.compile would do without this tag
@torch.library.custom_op("hooked_mllm::hybrid_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op(
    q: Tensor, k: Tensor, v: Tensor, dense: list[int], sink: int, window: int, scale: float, start: Tensor | None,
    end: Tensor | None, with_lse: bool, how: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`hybrid_attention` by the `Route` that `how` names, and the log-sum-exp, which is empty without `with_lse`."""
    sink, window = _clip_sizes(q, k, sink, window)
    start, end = (None, None) if start is end is None and how != "naive" else _bounds(q, k, start, end)
    if start is not None and end is not None and how == "naive":
        flags = head_flags(dense, q.shape[1], q.device)
        with torch.autocast(q.device.type, enabled=False):  # autocast would round the float32 scores
            z, lse = naive_hybrid_attention(q, k, v, flags, sink, window, scale, start, end)
        return query_major(z), lse if with_lse else q.new_empty(0, dtype=torch.float32)
    from hooked_mllm.kernels.hybrid_attention.dispatch import triton_hybrid_attention  # Triton may be missing on CPUs

    with current_device(q.device):
        by_sdpa = how == "sdpa"
        z, lse = triton_hybrid_attention(q, k, v, tuple(dense), sink, window, scale, start, end, with_lse, by_sdpa)
    return z, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _clip_sizes(q: Tensor, k: Tensor, sink: int, window: int) -> tuple[int, int]:
    """Sink and window with the same effect, small enough for the kernels' 32-bit integers."""
    return min(sink, k.shape[2]), min(window, q.shape[2] + k.shape[2])


def _bounds(q: Tensor, k: Tensor, start: Tensor | None, end: Tensor | None) -> tuple[Bound, Bound]:
    """Start and end clipped to the keys: those of a whole prompt may be specified for its first chunks."""
    n, like = len(q), {"dtype": torch.int32, "device": q.device}
    start = torch.zeros(n, **like) if start is None else start.to(**like).clamp(min=0)
    end = torch.full((n,), k.shape[2], **like) if end is None else end.to(**like).clamp(max=k.shape[2])
    return start, end


@_op.register_fake
def _(q, k, v, dense, sink, window, scale, start, end, with_lse, how):
    # [batch query head d_head] in memory, as of the kernels
    z = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    return z, q.new_empty(q.shape[:3] if with_lse else (0,), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, dense, sink, window, scale, start, end, _, _ = inputs
    ctx.save_for_backward(q, k, v, start, end)
    ctx.settings = (dense, sink, window, scale)
    ctx.set_materialize_grads(False)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, dense: list[int], sink: int, window: int, scale: float, start: Tensor | None,
    end: Tensor | None, dz: Tensor | None, dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the op, for custom ops that call it: autograd records nothing inside them."""
    sink, window = _clip_sizes(q, k, sink, window)
    flags = head_flags(dense, q.shape[1], q.device)
    with torch.autocast(q.device.type, enabled=False):
        return naive_gradients(q, k, v, flags, sink, window, scale, *_bounds(q, k, start, end), dz, dlse)


def _backward(ctx: Any, dz: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, start, end = ctx.saved_tensors
    dlse = None if dlse is None or not dlse.numel() else dlse
    dense, sink, window, scale = ctx.settings
    # none for the eight arguments after q, k and v
    return (*gradients(q, k, v, dense, sink, window, scale, start, end, dz, dlse), *[None] * 8)


_op.register_autograd(_backward, setup_context=_setup)

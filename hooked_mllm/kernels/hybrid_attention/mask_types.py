"""Block-Sparse-Attention's mask types as dense heads, sink and window of a layer."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.kernels.streaming_window import check_sink_and_window

DENSE, STREAMING = 0, -1


class HeadPattern(NamedTuple):
    """The arguments of `hybrid_attention` that a layer's mask types represent."""

    dense: tuple[int, ...]
    sink: int
    window: int


def pattern_from_mask_types(
    head_mask_type: Tensor | Iterable[int], streaming_info: Tensor | Iterable[int], *, block: int | None = None
) -> HeadPattern:
    """A layer's dense heads, sink and window from Block-Sparse-Attention's mask types.

    Type 0 is a dense head, -1 a streaming one; heads with their own block mask (types above 0) are not supported. Sizes
    are tokens, as in "exact" streaming, or with `block` blocks of that size. There, the window is between
    (local - 1) * block + 1 and local * block keys wide, depending on the query's position in its block; here it is
    local * block for every query.

    Args:
        head_mask_type: One integer for each query head of the layer.
        streaming_info: Sink and local size of each head, `[2 * head]` or `[head, 2]`; ignored for dense heads.
        block: The size of a block, 128 in that library; None if sizes are tokens.

    Raises:
        InputError: For sizes that do not fit, or that differ between streaming heads.
        HeadError: For heads with a block mask, or types below -1.

    Source: arXiv:2410.10819 and the interface of its kernel library, Block Sparse Attention.

    Examples:
        >>> pattern_from_mask_types([-1, 0, -1, 0], [64, 256] * 4)
        HeadPattern(dense=(1, 3), sink=64, window=256)
        >>> pattern_from_mask_types([-1, 0], [1, 3] * 2, block=128)
        HeadPattern(dense=(1,), sink=128, window=384)
    """
    types, sizes = _integers("head_mask_type", head_mask_type), _integers("streaming_info", streaming_info)
    if types.dim() != 1 or not len(types):
        raise InputError(f"head_mask_type is one integer for each query head; got shape {tuple(types.shape)}.")
    if sizes.numel() != 2 * len(types) or tuple(sizes.shape) not in ((2 * len(types),), (len(types), 2)):
        raise InputError(
            f"streaming_info is a sink and a local size for each of {len(types)} heads, [{2 * len(types)}] or "
            f"[{len(types)}, 2]; got shape {tuple(sizes.shape)}."
        )
    if block is not None and block < 1:
        raise InputError(f"block is a number of tokens; got {block}.")
    sparse = ((types > DENSE) | (types < STREAMING)).nonzero().flatten().tolist()
    if sparse:
        raise HeadError(
            f"Heads {sparse} have mask types {types[sparse].tolist()}: hybrid attention supports 0 (dense) and -1 "
            "(streaming), no block masks. Make such heads dense, or use Block-Sparse-Attention for them."
        )
    streaming = {tuple(pair) for pair in sizes.reshape(-1, 2)[types == STREAMING].tolist()}
    if len(streaming) > 1:
        raise InputError(f"Streaming heads of a layer share one sink and one window here; got {sorted(streaming)}.")
    sink, local = streaming.pop() if streaming else (0, 1)
    check_sink_and_window(sink, local, "local size")
    size = 1 if block is None else block
    return HeadPattern(tuple((types == DENSE).nonzero().flatten().tolist()), sink * size, local * size)


def _integers(name: str, values: Tensor | Iterable[int]) -> Tensor:
    try:
        tensor = torch.as_tensor(values if isinstance(values, Tensor) else list(values)).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"`{name}` must contain integers; they cannot be read: {error}.") from None
    if tensor.numel() and (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool):
        raise InputError(f"`{name}` must contain integers; got {tensor.dtype}.")
    return tensor.long()

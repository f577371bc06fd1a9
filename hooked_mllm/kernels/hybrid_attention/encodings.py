"""Head sets from the encodings of other projects: DuoAttention's gates, Block-Sparse-Attention's mask types."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads import HeadSet

DENSE, STREAMING = 0, -1


class HeadPattern(NamedTuple):
    """The arguments of `hybrid_attention` that a layer's mask types stand for."""

    dense: tuple[int, ...]
    sink: int
    window: int


def heads_from_gates(
    gates: Tensor | np.ndarray | Sequence[Sequence[float]],
    n_heads: int,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
) -> HeadSet:
    r"""The dense heads of DuoAttention's gates: one number in 0..1 for each key-value head of each layer.

    Key-value head g of layer l is dense iff `gates[l, g] >= threshold`; then all query heads that read it are.
    With `sparsity` in place of a threshold, that share of all gates, the smallest, streams. Ties at the border are cut
    by place, so that the number of dense heads is exact: of equal gates those of earlier layers and heads stay dense.

    Gates of query heads (as many columns as query heads) are taken as they are.

    Args:
        gates: `[layer, kv_head]`, a tensor, an array or nested lists, such as `numpy.loadtxt` makes of a file
            `full_attention_heads.tsv`. Values a little outside 0..1, as training leaves them, are clipped.
        n_heads: Query heads of a layer.
        threshold: The least gate of a dense head; 0.5 if neither is given.
        sparsity: The share of heads that stream, 0..1.

    Raises:
        InputError: for gates that are no matrix of finite numbers, or a threshold or a share out of range.
        HeadError: if the query heads cannot be shared evenly among the gates of a layer.

    Source: arXiv:2410.10819.

    Examples:
        >>> print(heads_from_gates([[0.9, 0.1], [0.0, 0.6]], n_heads=4))
        L0H0, L0H1, L1H2, L1H3
        >>> print(heads_from_gates([[0.9, 0.1], [0.0, 0.6]], n_heads=2, sparsity=0.75))
        L0H0
    """
    if threshold is not None and sparsity is not None:
        raise InputError("Give a threshold or a sparsity, not both.")
    values = _gates(gates)
    if n_heads < 1 or n_heads % values.shape[1]:
        raise HeadError(f"{n_heads} query heads cannot share {values.shape[1]} gates of a layer evenly.")
    if sparsity is not None:
        if not 0 <= sparsity <= 1:
            raise InputError(f"sparsity is the share of heads that stream, 0 to 1; got {sparsity}.")
        kept = values.numel() - round(sparsity * values.numel())
        order = values.flatten().argsort(descending=True, stable=True)
        dense = torch.zeros(values.numel(), dtype=torch.bool)
        dense[order[:kept]] = True
        dense = dense.view_as(values)
    else:
        threshold = 0.5 if threshold is None else threshold
        if not math.isfinite(threshold):
            raise InputError(f"threshold must be a number; got {threshold}.")
        dense = values >= threshold
    return HeadSet.from_mask(dense.repeat_interleave(n_heads // values.shape[1], dim=1))


def _gates(gates: Any) -> Tensor:
    expected = "Expected gates [layer, kv_head], one finite number in 0..1 for each key-value head"
    try:
        values = torch.as_tensor(gates).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{expected}; got something else: {error}.") from None
    if values.dim() != 2 or 0 in values.shape:
        raise InputError(f"{expected}; got shape {tuple(values.shape)}.")
    if not values.isfinite().all() or values.min() < -0.05 or values.max() > 1.05:
        raise InputError(f"{expected}; got values from {values.min():.3g} to {values.max():.3g}.")
    return values.clamp(0, 1)


def pattern_from_mask_types(
    head_mask_type: Tensor | Iterable[int],
    streaming_info: Tensor | Iterable[int],
    *,
    block: int | None = None,
) -> HeadPattern:
    """A layer's dense heads, sink and window from Block-Sparse-Attention's mask types.

    Type 0 is a dense head, -1 a streaming one. Types above 0 are heads with a block mask of their own, which
    `hybrid_attention` has not. The window of both counts the query's own position.

    Sizes are tokens, as of "exact" streaming. With `block` they are blocks of so many tokens, whose window ends at the
    border of a block: it is then between (local - 1) * block + 1 and local * block keys wide, depending on the query's
    place in its block. The window here is local * block for all, which holds every key of theirs and a few more.

    Args:
        head_mask_type: One integer for each query head of the layer.
        streaming_info: Sink and local sizes of the heads one after the other, `[2 * head]` or `[head, 2]`; those of
            heads that do not stream are not read.
        block: The size of a block, 128 in that library; None if sizes are tokens.

    Raises:
        InputError: for sizes that do not fit, or that differ between streaming heads.
        HeadError: for heads with a block mask, or types below -1.

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
            f"Heads {sparse} have mask types {types[sparse].tolist()}: hybrid attention knows 0 (dense) and -1 "
            "(streaming), no block masks. Make such heads dense, or keep that library for them."
        )
    found = {tuple(pair) for pair in sizes.reshape(-1, 2)[types == STREAMING].tolist()}
    if len(found) > 1:
        raise InputError(f"Streaming heads of a layer share one sink and one window here; got {sorted(found)}.")
    sink, local = found.pop() if found else (0, 1)
    if sink < 0 or local < 1:
        raise InputError(f"Expected a sink of at least 0 and a local size of at least 1; got {sink} and {local}.")
    size = 1 if block is None else block
    return HeadPattern(tuple((types == DENSE).nonzero().flatten().tolist()), sink * size, local * size)


def _integers(name: str, values: Any) -> Tensor:
    try:
        found = torch.as_tensor(values if isinstance(values, Tensor) else list(values)).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"`{name}` must hold integers; got something else: {error}.") from None
    if found.numel() and (found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool):
        raise InputError(f"`{name}` must hold integers; got {found.dtype}.")
    return found.long()

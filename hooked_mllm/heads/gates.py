"""A HeadSet from DuoAttention's gates, one number for each key-value head."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads.head_set import HeadSet


@checked
def heads_from_gates(
    gates: Tensor | np.ndarray | Sequence[Sequence[float]],
    n_heads: int,
    *,
    threshold: float | None = None,
    sparsity: float | None = None,
) -> HeadSet:
    r"""The dense heads of DuoAttention's gates: one number in 0..1 for each key-value head of each layer.

    Key-value head g of layer l is dense iff `gates[l, g] >= threshold`; then all query heads that read it are.
    With `sparsity`, that share of all gates, the smallest, streams; of equal gates those of earlier layers and heads
    stay dense.

    Args:
        gates: `[layer, kv_head]`, or one column for each query head, such as `numpy.loadtxt` reads from a file
            `full_attention_heads.tsv`. Values a little outside 0..1, as training leaves them, are clipped.
        n_heads: Query heads of a layer.
        threshold: The least gate of a dense head; 0.5 if neither is specified.
        sparsity: The share of heads that stream, 0..1.

    Raises:
        InputError: For gates that are no matrix of finite numbers, or a threshold or a share out of range.
        HeadError: If the query heads cannot be shared evenly among the gates of a layer.

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
        n_dense = values.numel() - round(sparsity * values.numel())
        ranks = values.flatten().argsort(descending=True, stable=True).argsort()
        dense = (ranks < n_dense).view_as(values)
    else:
        threshold = 0.5 if threshold is None else threshold
        if not math.isfinite(threshold):
            raise InputError(f"threshold must be a number; got {threshold}.")
        dense = values >= threshold - 1e-7  # a gate of float32 reaches the number that it was rounded from
    return HeadSet.from_mask(dense.repeat_interleave(n_heads // values.shape[1], dim=1))


def _gates(gates: object) -> Tensor:
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

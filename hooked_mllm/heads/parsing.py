"""The one parser of heads: whatever way they are specified in, as a `HeadSet`, or as heads of one layer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.display.head_names import head_names
from hooked_mllm.display.read_heads import HeadsLike as HeadsLike
from hooked_mllm.display.read_heads import not_heads, other_shape, read_heads, whole_number
from hooked_mllm.errors import HeadError
from hooked_mllm.heads.head_set import HeadSet

#: heads of a model whose shape is not known yet
Pairs = tuple[tuple[int, int], ...]

if TYPE_CHECKING:
    #: heads of one layer: numbers, or whatever specifies heads with their layer
    LayerHeadsLike = int | Iterable[int] | HeadsLike
else:  # as for HeadsLike
    LayerHeadsLike = Any


@overload
def parse_heads(
    heads: HeadsLike, shape: tuple[int, int], *, whose: str = ..., hint: str = ..., allow_empty: bool = ...
) -> HeadSet: ...
@overload
def parse_heads(
    heads: HeadsLike, shape: None = None, *, whose: str = ..., hint: str = ..., allow_empty: bool = ...
) -> HeadSet | Pairs: ...
@checked
def parse_heads(
    heads: HeadsLike,
    shape: tuple[int, int] | None = None,
    *,
    whose: str = "this model",
    hint: str = "",
    allow_empty: bool = True,
) -> HeadSet | Pairs:
    """Heads as a `HeadSet`, or as pairs where neither the caller nor the input states the shape of the model.

    Args:
        heads: "L2H4", "L2H4, L3H1", (2, 4), a `HeadSet`, a boolean mask `[layer head]`, a mapping such as {2: [4, 5]},
            or an iterable of these.
        shape: (layers, heads per layer); None if the model is not known yet.
        whose: What has this shape, for the error message.
        hint: What to do about heads of another shape, for the error message.
        allow_empty: Whether there may be no head.

    Raises:
        HeadError: For anything else, or heads that the model lacks.

    Examples:
        >>> parse_heads("L2H4, L3H1", (6, 8))
        HeadSet(2 of 6 x 8: L2H4, L3H1)
        >>> parse_heads([(2, 4), "L3H1"])
        ((2, 4), (3, 1))
    """
    if isinstance(heads, HeadSet) and shape not in (None, heads.shape):
        raise other_shape(heads.shape, shape, whose, hint)
    if isinstance(heads, HeadSet):
        parsed: HeadSet | Pairs = heads
    else:
        pairs, known = read_heads(heads, shape, whose=whose)
        parsed = pairs if known is None else HeadSet(pairs, n_layers=known[0], n_heads=known[1])
    if not parsed and not allow_empty:
        raise HeadError("The set of heads is empty: expected at least one head, such as [(20, 15)].")
    return parsed


@checked
def heads_in_layer(
    heads: LayerHeadsLike, layer: int, shape: tuple[int, int], *, whose: str = "this model"
) -> list[int]:
    """Heads of one layer, by number.

    Args:
        heads: Numbers, negative ones counted from the end, or a boolean mask `[head]`. Heads with a layer ("L2H4",
            pairs in a list) must be of this one; of a `HeadSet` or a mask `[layer head]` those in this layer count.
        layer: The layer, from 0.
        shape: (layers, heads per layer).
        whose: What has this shape, for the error message.

    Raises:
        HeadError: For anything else, a head that the layer lacks, or a set without a head in this layer.

    Examples:
        >>> heads_in_layer("L2H4", 2, (6, 8)), heads_in_layer([2, -1], 2, (6, 8))
        ([4], [2, 7])
    """
    if isinstance(heads, Iterator):  # it can be read only once
        heads = cast(LayerHeadsLike, list(heads))
    numbers = _numbers(heads, shape[1])
    if numbers is not None:
        outside = [head for head in numbers if not -shape[1] <= head < shape[1]]
        if outside:
            raise HeadError(f"Head {outside[0]} is not there: heads of layer {layer} are 0 to {shape[1] - 1}.")
        return [head % shape[1] for head in numbers]
    parsed = parse_heads(cast(HeadsLike, heads))
    if isinstance(parsed, HeadSet):
        inside = [head for at, head in parse_heads(parsed, shape, whose=whose) if at == layer]
        if not inside:
            raise HeadError(f"{parsed!r} has no head in layer {layer}.")
        return inside
    elsewhere = [pair for pair in parsed if pair[0] != layer]
    if elsewhere:
        raise HeadError(f"Expected heads of layer {layer}; got {', '.join(head_names(elsewhere))}.")
    return [head for _, head in HeadSet(parsed, n_layers=shape[0], n_heads=shape[1])]


def _numbers(heads: object, n_heads: int) -> list[int] | None:
    """Numbers of heads, or the positions of a mask `[head]`; None for heads that have a layer."""
    single = whole_number(heads)
    if single is not None:
        return [single]
    if isinstance(heads, str | Mapping) or not isinstance(heads, Iterable):
        return None
    items: list[object] = heads.tolist() if isinstance(heads, Tensor | np.ndarray) else list(heads)
    if items and all(isinstance(item, bool | np.bool_) for item in items):
        if len(items) != n_heads:
            raise not_heads(heads)
        return [head for head, flag in enumerate(items) if flag]
    numbers = [whole_number(item) for item in items]
    return None if None in numbers else [number for number in numbers if number is not None]

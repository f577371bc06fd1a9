"""HeadSet: an immutable, ordered set of attention heads of one model shape."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.checks import as_device, checked
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.head_names import head_names, parse_head, parse_names
from hooked_mllm.display.read_heads import HeadsLike, not_heads, read_heads, whole_number
from hooked_mllm.errors import HeadError


def heads_by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """The heads of each layer that has any, layers and heads in ascending order."""
    layers: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        layers.setdefault(layer, []).append(head)
    return {layer: tuple(inside) for layer, inside in layers.items()}


@checked
class HeadSet:
    """An immutable set of (layer, head), in the order in which they were specified, for a model of one shape.

    Two sets are equal if they contain the same heads of the same shape, in any order. Set algebra keeps the order of
    the left operand.

    Args:
        heads: Pairs (layer, head), names such as "L20H15", a boolean mask `[layer head]`, or a list of these; repeated
            ones count once. May be empty. For text, see `HeadSet.parse`.
        n_layers: Number of decoder layers of the model.
        n_heads: Number of query heads per layer.

    Raises:
        HeadError: For a head that such a model does not have.

    Examples:
        >>> core = HeadSet(["L20H15", (3, 2)], n_layers=36, n_heads=32)
        >>> print(core - HeadSet.parse("L3H2", n_layers=36, n_heads=32))
        L20H15
        >>> core.by_layer
        {3: (2,), 20: (15,)}
    """

    __slots__ = ("_heads", "n_heads", "n_layers")

    n_layers: int
    n_heads: int
    _heads: dict[tuple[int, int], None]

    def __init__(self, heads: HeadsLike = (), *, n_layers: SupportsIndex, n_heads: SupportsIndex) -> None:
        shape = whole_number(n_layers) or 0, whole_number(n_heads) or 0
        if min(shape) < 1:
            raise HeadError(f"A model has at least one layer and one head; got {n_layers} layers of {n_heads} heads.")
        if isinstance(heads, str):
            raise HeadError(f"For heads written as text use HeadSet.parse({heads!r}, n_layers=..., n_heads=...).")
        # a set of another model is read head by head
        pairs = read_heads(list(heads) if isinstance(heads, HeadSet) else heads, shape).pairs
        object.__setattr__(self, "_heads", dict.fromkeys(pairs))
        object.__setattr__(self, "n_layers", shape[0])
        object.__setattr__(self, "n_heads", shape[1])

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"A HeadSet does not change: make a new one instead of setting {name!r}.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("A HeadSet does not change.")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (tuple(self._heads), self.n_layers, self.n_heads)

    @classmethod
    def parse(cls, text: str, *, n_layers: SupportsIndex, n_heads: SupportsIndex) -> "HeadSet":
        """Read the text form "L20H15, L3H2" (commas, semicolons or spaces between heads; empty text, empty set)."""
        return cls(parse_names(text), n_layers=n_layers, n_heads=n_heads)

    @classmethod
    def from_mask(cls, mask: Bool[Tensor, "layer head"] | np.ndarray | Sequence[Sequence[bool]]) -> "HeadSet":
        """The heads where `mask` is true, layer by layer."""
        pairs, shape = read_heads(mask)
        if shape is None:
            raise not_heads(mask)
        return cls(pairs, n_layers=shape[0], n_heads=shape[1])

    def to_mask(self, device: torch.device | str = "cpu") -> Bool[Tensor, "layer head"]:
        """True at the heads of the set."""
        mask = torch.zeros(self.n_layers, self.n_heads, dtype=torch.bool)
        if self:
            mask[tuple(zip(*self, strict=True))] = True  # indices (layers, heads)
        return mask.to(as_device(device))

    @property
    def by_layer(self) -> dict[int, tuple[int, ...]]:
        """The heads of each layer that has any, layers and heads in ascending order."""
        return heads_by_layer(self)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads per layer) of the model."""
        return self.n_layers, self.n_heads

    def union(self, other: HeadsLike) -> "HeadSet":
        """The heads of either, those of this set first; `other` in any form, as in `heads | "L2H4"`."""
        return self._like([*self, *self._same_model(other)])

    def intersection(self, other: HeadsLike) -> "HeadSet":
        """The heads of this set that `other` has, too; also as `heads & other`."""
        others = self._same_model(other)
        return self._like(head for head in self if head in others)

    def difference(self, other: HeadsLike) -> "HeadSet":
        """The heads of this set that `other` lacks; also as `heads - other`."""
        others = self._same_model(other)
        return self._like(head for head in self if head not in others)

    __or__ = union
    __and__ = intersection
    __sub__ = difference

    def __contains__(self, head: object) -> bool:
        if isinstance(head, str):
            head = parse_head(head)
        return isinstance(head, tuple) and head in self._heads

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._heads)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> "HeadSet": ...
    def __getitem__(self, index: int | slice) -> "tuple[int, int] | HeadSet":
        """The head at a position in the order, or the set of a slice of it."""
        heads = list(self._heads)
        if not isinstance(index, slice) and not -len(heads) <= index < len(heads):
            raise HeadError(f"No head at position {index} of a set of {len(heads)}.")
        return self._like(heads[index]) if isinstance(index, slice) else heads[index]

    def __len__(self) -> int:
        return len(self._heads)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadSet):
            return NotImplemented
        return self.shape == other.shape and self._heads.keys() == other._heads.keys()

    def __hash__(self) -> int:
        return hash((self.shape, frozenset(self._heads)))

    def __str__(self) -> str:
        return ", ".join(head_names(self))

    def __repr__(self) -> str:
        shown = str(self if len(self) <= 8 else self[:8]) + (", ..." if len(self) > 8 else "")
        listed = f": {shown}" if shown else ""
        return f"HeadSet({len(self)} of {self.n_layers} x {self.n_heads}{listed})"

    def _repr_html_(self) -> str:
        by_layer = self.by_layer.items()
        lines = [
            (f"layer {layer}", ", ".join(head_names((layer, head) for head in heads))) for layer, heads in by_layer
        ]
        title = f"HeadSet: {len(self)} heads of {self.n_layers} layers x {self.n_heads} heads"
        return html_block(title, html_table(lines, named=True))

    def _like(self, heads: Iterable[tuple[int, int]]) -> "HeadSet":
        return HeadSet(heads, n_layers=self.n_layers, n_heads=self.n_heads)

    def _same_model(self, other: HeadsLike) -> "HeadSet":
        if not isinstance(other, HeadSet):
            return self._like(read_heads(other, self.shape, whose="this set").pairs)
        if self.shape != other.shape:
            raise HeadError(
                f"These heads belong to models of different shape, {self.n_layers} x {self.n_heads} and "
                f"{other.n_layers} x {other.n_heads} (layers x heads), and cannot be combined."
            )
        return other


def _rebuild(heads: tuple[tuple[int, int], ...], n_layers: int, n_heads: int) -> HeadSet:
    return HeadSet(heads, n_layers=n_layers, n_heads=n_heads)

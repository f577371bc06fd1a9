"""One reader for every way to specify heads, for plots and `heads.parsing` alike: it imports no `HeadSet`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hooked_mllm.display.head_names import head_name, parse_head, parse_names, shortened_repr
from hooked_mllm.errors import HeadError


@runtime_checkable
class HeadCollection(Protocol):
    """Pairs (layer, head) of a model of known shape, such as a `HeadSet`."""

    @property
    def n_layers(self) -> int: ...  # noqa: D102

    @property
    def n_heads(self) -> int: ...  # noqa: D102  # per layer

    def __iter__(self) -> Iterator[tuple[int, int]]: ...


if TYPE_CHECKING:
    _OneOrMore = str | tuple[int, int] | HeadCollection | Tensor | np.ndarray | Sequence[int] | Sequence[bool]
    #: every way to specify heads: "L2H4", "L2H4, L3H1", (2, 4), a HeadSet, a mask [layer head], {2: [4, 5]}, or a list
    HeadsLike = _OneOrMore | Mapping[int, int | Iterable[int]] | Iterable[_OneOrMore]
else:  # at run time anything, so that another value reaches `read_heads`, whose error states what was expected
    HeadsLike = Any


class HeadPairs(NamedTuple):
    """Heads as they were read: (layer, head) in the order of the input, each once."""

    pairs: tuple[tuple[int, int], ...]
    shape: tuple[int, int] | None  # (layers, heads per layer); None where neither the caller nor the input states it


def read_head(head: object) -> tuple[int, int]:
    """One head: a name, or a pair of integers."""
    if isinstance(head, str):
        return parse_head(head)
    pair = head.tolist() if isinstance(head, Tensor | np.ndarray) else head
    if not isinstance(pair, tuple | list) or not _is_pair(pair):
        raise not_heads(head)
    return _pair(pair)


def whole_number(value: object) -> int | None:
    """An integer of Python, NumPy or torch as a plain int; None for anything else, booleans included."""
    if type(value) is int:  # the usual case
        return value
    if isinstance(value, Tensor | np.ndarray):
        return int(value) if value.ndim == 0 and _dtype_kind(value) == "i" else None
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def check_in_range(layer: int, head: int, shape: tuple[int, int] | None) -> tuple[int, int]:
    """The same head, if a model of this shape has it; with an unknown shape, if both numbers are 0 or more."""
    name = head_name(layer, head)
    if layer < 0 or (shape is not None and layer >= shape[0]):
        known = f"are 0 to {shape[0] - 1}" if shape else "count from 0"
        raise HeadError(f"Layer {layer} of head {name} is not there: layers {known}.")
    if head < 0 or (shape is not None and head >= shape[1]):
        known = f"are 0 to {shape[1] - 1} in every layer" if shape else "count from 0"
        raise HeadError(f"Head {head} of {name} is not there: heads {known}.")
    return layer, head


def read_heads(heads: HeadsLike, shape: tuple[int, int] | None = None, *, whose: str = "this model") -> HeadPairs:
    """Read `HeadsLike`, of a model of `shape` (layers, heads per layer) where it is known.

    Text, a pair, an integer array `[2]` or `[n, 2]`, a `HeadSet`, a mapping of layers to heads, a boolean mask
    `[layer head]` (nested lists too), or an iterable of these. `whose` has this shape, for error messages.
    """
    reader = _Reader(shape)
    reader.read(heads)
    known = shape or (reader.stated[0] if reader.stated else None)
    for other in reader.stated:
        if other != known:
            raise other_shape(other, known, whose if shape else "another set or mask among them")
    return HeadPairs(tuple(dict.fromkeys(check_in_range(*pair, known) for pair in reader.pairs)), known)


def other_shape(
    own: tuple[int, int], expected: tuple[int, int] | None, whose: str = "this model", hint: str = ""
) -> HeadError:
    """The error for heads of a model of `own` shape (layers, heads) where `whose` has the `expected` one."""
    sizes = [f"{layers} x {heads}" for layers, heads in (own, expected or own)]
    text = f"These heads belong to a model of {sizes[0]} (layers x heads); {whose} has {sizes[1]}."
    return HeadError(f"{text} {hint}".rstrip())


def not_heads(value: object) -> HeadError:
    """The error for a value that specifies no heads."""
    return HeadError(
        "Expected a head as (layer, head) or 'L2H4', or heads as a HeadSet, a boolean mask [layer head], a mapping of "
        f"layers to query heads such as {{2: [4, 5]}}, or a list of these; got {_shown(value)}."
    )


@dataclass
class _Reader:
    """Reads one value after the other; `stated` are the shapes of the sets and masks among them."""

    shape: tuple[int, int] | None
    pairs: list[tuple[int, int]] = field(default_factory=list)
    stated: list[tuple[int, int]] = field(default_factory=list)

    def read(self, value: object) -> None:
        if isinstance(value, str):
            self.pairs += parse_names(value)
        elif isinstance(value, Tensor | np.ndarray):
            self.read_array(value)
        elif isinstance(value, tuple | list) and _is_pair(value):
            self.pairs.append(_pair(value))
        elif isinstance(value, tuple | list):  # before the Protocol, which is slow to check
            self.read_items([*value], value)
        elif isinstance(value, Mapping):
            for layer, inside in value.items():
                several = isinstance(inside, Iterable) and not isinstance(inside, str)
                self.pairs += [_pair((layer, head)) for head in (inside if several else [inside])]
        elif isinstance(value, HeadCollection):
            self.pairs += value
            self.stated.append((int(value.n_layers), int(value.n_heads)))
        elif isinstance(value, Iterable):
            self.read_items([*value], value)
        else:
            raise not_heads(value)

    def read_items(self, items: list[Any], whole: object) -> None:
        if items and all(_is_flags(item) for item in items):
            mask = [[bool(flag) for flag in row] for row in items]
            if len({len(row) for row in mask}) > 1:
                raise not_heads(whole)
            self.read_array(np.array(mask))
            return
        pairs_or_mask = all(isinstance(item, list) and _is_pair(item, (0, 1)) for item in items)
        if items and self.shape in (None, (len(items), 2)) and pairs_or_mask:
            raise HeadError(
                f"{_shown(whole)} may be pairs (layer, head) or a mask of 0 and 1: write pairs as tuples, such as "
                "(0, 1), or a mask with True and False."
            )
        for item in items:
            if isinstance(item, tuple | list) and _is_pair(item):
                self.pairs.append(_pair(item))
            elif isinstance(item, Iterable):
                self.read(item)
            else:
                raise not_heads(whole if isinstance(whole, tuple) else item)

    def read_array(self, array: Tensor | np.ndarray) -> None:
        kind, size = _dtype_kind(array), tuple(array.shape)
        if kind == "b" and len(size) == 2:  # [layer head]
            self.stated.append((size[0], size[1]))
            layers, heads = torch.as_tensor(array).nonzero(as_tuple=True)
            self.pairs += zip(layers.tolist(), heads.tolist(), strict=True)
        elif kind == "i" and size[-1:] == (2,) and len(size) <= 2:
            self.pairs += [_pair(pair) for pair in array.reshape(-1, 2).tolist()]
        elif 0 in size and kind != "b":
            return
        elif kind == "O":
            self.read_items(array.tolist(), array)
        else:
            raise not_heads(array)


def _pair(value: Sequence[Any]) -> tuple[int, int]:
    layer, head = (whole_number(number) for number in value)
    if layer is None or head is None:
        raise not_heads(value)
    return layer, head


def _is_pair(value: Sequence[Any], among: tuple[int, ...] | None = None) -> bool:
    if len(value) != 2:
        return False
    numbers = [whole_number(number) for number in value]
    return None not in numbers and (among is None or set(numbers) <= set(among))


def _is_flags(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether a value is one row of a boolean mask."""
    if isinstance(value, Tensor | np.ndarray):
        return value.ndim == 1 and len(value) > 0 and _dtype_kind(value) == "b"
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(x, bool | np.bool_) for x in value)


def _dtype_kind(array: Tensor | np.ndarray) -> str:
    """One of: "b" for booleans, "i" for integers, "O" for text and objects, "f" for other numbers."""
    if isinstance(array, Tensor):
        if array.dtype == torch.bool:
            return "b"
        return "f" if array.is_floating_point() or array.is_complex() else "i"
    return {"b": "b", "i": "i", "u": "i", "U": "O", "O": "O"}.get(array.dtype.kind, "f")


def _shown(value: object) -> str:
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"an array of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return shortened_repr(value)

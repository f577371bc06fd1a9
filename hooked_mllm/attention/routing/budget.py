"""The number of dense heads of a layer, decided before the later layers run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads import HeadSet, HeadsLike, head_names, parse_heads
from hooked_mllm.heads.parsing import Pairs


@runtime_checkable
class Budget(Protocol):
    """Bounds the number of dense heads of a layer, depending on those of earlier layers of the same prompt."""

    def room(self, layer: int, taken: Mapping[int, int], n_layers: int) -> int:
        """The largest number of dense heads of this layer; `taken` has the numbers of the layers before it."""
        ...

    def validate(self, n_layers: int, n_heads: int) -> None:
        """Raise if it does not fit a model of this shape."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        ...


@dataclass(frozen=True)
class PerLayer:
    """At most `heads` dense heads in every layer.

    Args:
        heads: A number of 0 or more; others raise an `InputError`.

    Examples:
        >>> PerLayer(2).room(layer=3, taken={0: 2}, n_layers=6)
        2
    """

    heads: int

    def __post_init__(self) -> None:
        _check_count(self.heads)

    def room(self, layer: int, taken: Mapping[int, int], n_layers: int) -> int:
        """`heads`, independent of earlier layers."""
        return self.heads

    def validate(self, n_layers: int, n_heads: int) -> None:
        """Raise a `HeadError` for more heads than a layer has."""
        if self.heads > n_heads:
            raise HeadError(f"PerLayer({self.heads}): a layer of this model has {n_heads} heads.")

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        return {"budget": "PerLayer", "heads": self.heads}


@dataclass(frozen=True)
class Total:
    r"""At most `heads` dense heads in all layers together, of them `round(heads * w(l))` in layers 0 to l.

    - `like=None`: w(l) = (l + 1) / L, the same share for every layer.
    - `like` a set of heads: the share of that set in layers 0 to l.
    - `like="first"`: w(l) = 1 from the first layer on. Early layers use all of it unless the policy has a threshold.

    Args:
        heads: A number of 0 or more.
        like: Heads (a `HeadSet`, "L2H4, L3H1", pairs, a boolean mask), "first", or None.

    Raises:
        InputError: For a number below 0, another word than "first", or an empty set with room for heads.

    Examples:
        >>> budget, taken = Total(6), {0: 1, 1: 0}
        >>> budget.room(2, taken, n_layers=6), budget.room(5, taken, n_layers=6)
        (2, 5)
        >>> core = HeadSet(["L2H4", "L2H5", "L3H0"], n_layers=6, n_heads=8)
        >>> tuple(Total(3, like=core).room(layer, {}, n_layers=6) for layer in range(6))
        (0, 0, 2, 3, 3, 3)
    """

    heads: int
    like: HeadsLike | None = None

    def __post_init__(self) -> None:
        _check_count(self.heads)
        if self.like is None or (isinstance(self.like, str) and self.like == "first"):
            return
        try:
            spread = parse_heads(self.like)
        except HeadError as error:
            raise InputError(f"Expected `like` to be heads, 'first' or None. {error}") from None
        if not spread and self.heads:
            raise InputError(f"An empty set does not state how to spread {self.heads} heads over the layers.")
        object.__setattr__(self, "like", spread)

    @property
    def _spread(self) -> HeadSet | Pairs | None:
        """The heads whose layers the budget is spread like; None if there are none."""
        return None if self.like is None or isinstance(self.like, str) else parse_heads(self.like)

    def room(self, layer: int, taken: Mapping[int, int], n_layers: int) -> int:
        """The number that layers 0 to `layer` may use together, less that of the layers before it."""
        spread = self._spread
        if spread is not None:
            part, whole = sum(at <= layer for at, _ in spread), len(spread) or 1
        else:
            part, whole = (1, 1) if self.like == "first" else (layer + 1, n_layers)
        allowed = (2 * self.heads * part + whole) // (2 * whole)  # rounded, halves up, in whole numbers
        return max(0, allowed - sum(count for at, count in taken.items() if at < layer))

    def validate(self, n_layers: int, n_heads: int) -> None:
        """Raise a `HeadError` for more heads than the model has, or a set of another model."""
        if self.heads > n_layers * n_heads:
            raise HeadError(f"Total({self.heads}): this model has {n_layers} layers of {n_heads} heads.")
        if self._spread is not None:
            parse_heads(self._spread, (n_layers, n_heads), hint="The budget is spread over the layers as they are.")

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        like = self.like if self._spread is None else head_names(self._spread)
        return {"budget": "Total", "heads": self.heads, "like": like}


def _check_count(heads: int) -> None:
    if type(heads) is not int or heads < 0:
        raise InputError(f"Expected a whole number of heads, 0 or more; got {heads!r}.")

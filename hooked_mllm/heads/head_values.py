"""The data of head scores, checked: values, counts, missing layers, and where they came from."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads.head_set import HeadSet

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    #: numbers as a tensor, an array or nested lists
    Numbers = Tensor | ArrayLike
else:  # at run time anything, so that another value reaches the check whose error states what was expected
    Numbers = Any

#: the class whose method is called, such as `HeadScores`
Scores = TypeVar("Scores", bound="HeadValues")


class HeadValues:
    """One float64 per head of a model; `HeadScores` documents the arguments and ranks them."""

    values: Tensor
    counts: Tensor | None
    name: str
    provenance: dict[str, Any]
    missing: tuple[int, ...]

    def __init__(
        self,
        values: Numbers,
        *,
        name: str = "scores",
        provenance: Mapping[str, Any] | None = None,
        counts: Numbers | None = None,
        missing: Sequence[int] = (),
    ) -> None:
        self.values = as_float64(values, "values of shape [layer head]")
        if self.values.dim() != 2 or 0 in self.values.shape:
            raise HeadError(f"Expected values of shape [layer head]; got shape {list(self.values.shape)}.")
        self.name = name
        self.provenance = dict(provenance or {})
        self.missing = tuple(sorted({int(layer) for layer in missing}))
        for layer in self.missing:
            if not 0 <= layer < self.n_layers:
                raise HeadError(f"Missing layer {layer} is out of range: layers are 0 to {self.n_layers - 1}.")
        if len(self.missing) == self.n_layers:
            raise HeadError("Every layer is declared missing: there are no scores.")
        self.values[list(self.missing)] = torch.nan
        bad = ~self.values.isfinite()
        bad[list(self.missing)] = False
        if bool(bad.any()):
            heads = HeadSet.from_mask(bad)
            raise NumericsError(
                f"{self.name}: {len(heads)} scores are not finite, first at {heads[:4]}. Expected finite numbers; "
                "declare layers that were not measured with `missing=`."
            )
        self.counts = None if counts is None else self._checked_counts(counts)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.values.shape[0]

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return self.values.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.n_layers, self.n_heads

    @property
    def measured(self) -> Bool[Tensor, "layer head"]:
        """True for the heads that have a score."""
        return ~self.values.isnan()

    def _size(self) -> str:
        return f"{self.n_layers} x {self.n_heads}"

    def _check_comparable(self, other: object) -> None:
        if not isinstance(other, HeadValues):
            raise HeadError(f"Expected HeadScores to compare {self.name} with; got {type(other).__name__}.")
        if self.shape != other.shape:
            raise HeadError(
                f"{self.name} is {self._size()} and {other.name} {other._size()} (layers x heads): "
                "scores of models of different shape cannot be compared head by head."
            )

    def _checked_counts(self, counts: Numbers) -> Tensor:
        numbers = as_float64(counts, "counts, whole numbers of samples")
        if not bool((numbers.isfinite() & (numbers >= 0) & (numbers == numbers.round())).all()):
            raise HeadError("Expected counts that are whole numbers of samples, 0 or more; got others, or NaN.")
        tensor = numbers.to(torch.int64)
        if tensor.dim() == 1 and tensor.shape[0] == self.n_layers:
            tensor = tensor[:, None].expand(self.shape)  # [layer] -> [layer head]
        if tuple(tensor.shape) != self.shape:
            expected = f"{list(self.shape)} or [{self.n_layers}]"
            raise HeadError(f"Expected counts of shape {expected}; got {list(tensor.shape)}.")
        return tensor.clone()


def as_float64(values: Numbers, expected: str) -> Tensor:
    """A float64 copy on the CPU; raises for something else than numbers, with what was expected."""
    if not isinstance(values, Tensor):
        try:
            values = torch.from_numpy(np.array(values, dtype=np.float64))  # torch would read a list as float32
        except (TypeError, ValueError) as error:
            raise HeadError(f"Expected {expected}, a tensor, an array or nested lists of numbers; {error}.") from None
    return values.detach().to(device="cpu", dtype=torch.float64, copy=True)

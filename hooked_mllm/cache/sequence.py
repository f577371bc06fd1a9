"""Which positions of a sequence the rows of a cache are: all of a prompt, a part behind a KV cache, a decoding step."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from hooked_mllm.errors import LayoutError
from hooked_mllm.inputs.positions import KindMasks, Positions, TokenKind, is_token_kind, resolve_positions

#: kinds that earlier tokens may have, too, which are in the KV cache alone
_OF_ALL_TOKENS = ("visual", "text", "padding", "template")


@dataclass(frozen=True)
class Span:
    """The rows of one run in their sequence.

    Attributes:
        first: Position of the first row.
        stop: Position after the last row.
        known: Position of the first token whose kind is known; those before are in a KV cache alone.
        generated: Whether it is a decoding step: "last" is its last row, and numbers may count its rows.
    """

    first: int
    stop: int
    known: int = 0
    generated: bool = False

    def __len__(self) -> int:
        return self.stop - self.first

    def rows(self, selected: Positions, batch: int, masks: KindMasks | None) -> Int[Tensor, "batch n"]:
        """Positions of the sequence as rows of this run, -1 where a sample has fewer."""
        index = self.queries(selected, batch, masks)
        return torch.where(index >= 0, index - self.first, -1)

    def queries(self, selected: Positions, batch: int, masks: KindMasks | None) -> Int[Tensor, "batch n"]:
        """Positions of the sequence that must be rows of this run; a slice is cut to them."""
        if isinstance(selected, slice) and len(self) < self.stop:
            selected = self._slice(selected, batch)
        index = self.positions(selected, batch, masks, rows=True)
        present = index >= 0
        counted = self.generated and not is_token_kind(selected) and _boolean(selected) is None
        if counted and len(self) <= self.first and bool((index < len(self)).all()):
            index = torch.where(present, index + self.first, -1)
        if bool((present & ((index < self.first) | (index >= self.stop))).any()):
            raise LayoutError(
                f"{selected!r} is not among the rows of this run, which are positions {self.first} to "
                f"{self.stop - 1} of the sequence."
            )
        return index

    def keys(self, selected: Positions, batch: int, masks: KindMasks | None) -> Int[Tensor, "batch n"]:
        """Positions of the sequence up to the last row, -1 where a sample has fewer."""
        if self.known and isinstance(selected, str) and selected in _OF_ALL_TOKENS:
            raise LayoutError(
                f"Which keys before position {self.known} are {selected!r} is not known: these inputs continue from "
                "`past_key_values` and do not contain those tokens. Give keys as a mask or as indices."
            )
        return self.positions(selected, batch, masks)

    def positions(
        self, selected: Positions, batch: int, masks: KindMasks | None, rows: bool = False
    ) -> Int[Tensor, "batch n"]:
        """Positions of the sequence; masks may be of the prompt, of the sequence, or with `rows` of the rows."""
        mask = _boolean(selected)
        if mask is not None:
            selected = self._extended(mask, batch, masks, rows)
        kinds = None if masks is None else lambda kind: self.mask(kind, batch, masks)
        return resolve_positions(selected, batch, self.stop, kinds)

    def mask(self, kind: TokenKind, batch: int, masks: KindMasks) -> Bool[Tensor, "batch pos"]:
        """The mask of a token kind over the sequence; generated tokens are of no kind."""
        if self.generated and isinstance(kind, str) and kind == "last":
            return torch.arange(self.stop).expand(batch, -1) == self.stop - 1
        return self._placed(each_row(masks(kind), batch))

    def _placed(self, mask: Tensor) -> Tensor:
        """A mask of the inputs in the sequence."""
        return pad(mask, (self.known, self.stop - self.known - mask.shape[-1]))

    def _extended(self, mask: Tensor, batch: int, masks: KindMasks | None, rows: bool) -> Tensor:
        samples, length = (batch, self.stop) if masks is None else masks("padding").shape
        if mask.dim() == 2 and len(mask) == samples:
            mask = each_row(mask, batch)
        given = mask.shape[-1]
        if given == self.stop or mask.dim() > 2:
            return mask
        if rows and given == len(self):
            return pad(mask, (self.first, 0))
        if given == length:
            return self._placed(mask)
        return pad(mask, (0, self.stop - given)) if given == length + self.known else mask

    def _slice(self, selected: slice, batch: int) -> Positions:
        """A slice of the sequence cut to the rows; in a decoding step, one of the rows if it has none."""
        try:
            inside = [position for position in range(self.stop)[selected] if position >= self.first]
            if not inside and self.generated:
                inside = [self.first + row for row in range(len(self))[selected]]
        except (TypeError, ValueError):  # no numbers: the resolver describes the problem
            return selected
        return inside or selected


def each_row(values: Shaped[Tensor, "sample n"], batch: int) -> Shaped[Tensor, "batch n"]:
    """A mask or indices for each row of a batch, on the CPU; beams and sequences of one prompt are adjacent."""
    values = values.cpu()
    return values if batch % len(values) else values.repeat_interleave(batch // len(values), dim=0)


def _boolean(selected: object) -> Tensor | None:
    """A mask in any form as a tensor; None for other positions."""
    if isinstance(selected, list | tuple) and selected and not is_token_kind(selected):
        try:
            selected = np.asarray(selected)
        except ValueError:  # ragged: the resolver describes the problem
            return None
    if isinstance(selected, np.ndarray) and selected.dtype == bool and selected.ndim:
        return torch.from_numpy(selected)
    return selected.cpu() if isinstance(selected, Tensor) and selected.dtype == torch.bool and selected.dim() else None

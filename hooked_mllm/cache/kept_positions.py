"""Positions of the sequence as rows and columns of what a run kept."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mllm.cache.lazy import Entry
from hooked_mllm.cache.sequence import Span, each_row
from hooked_mllm.errors import LayoutError
from hooked_mllm.inputs.positions import KindMasks, Positions, TokenKind, is_token_kind, resolve_positions


class KeptPositions:
    """Which positions a cache has; a part of `ActivationCache`."""

    span: Span | None
    query_positions: Int[Tensor, "batch query"] | None
    key_positions: Int[Tensor, "batch key"] | None
    kept_positions: Int[Tensor, "batch kept"] | None
    _masks: KindMasks | None

    def _span_of(self, length: int, kept: Tensor | None) -> Span:
        """The positions of this run; those of an axis of `length` entries where none were recorded."""
        if self.span is not None:
            return self.span
        return Span(0, length if kept is None or self._masks is None else self._masks("padding").shape[1])

    def _query_rows(self, selected: Positions, entry: Entry, tower: str) -> Int[Tensor, "batch n"]:
        """Positions of the sequence as rows of a pattern."""
        batch, length = entry.shape[0], entry.shape[2]
        if tower != "text":
            return resolve_positions(selected, batch, length, self._masks)
        span, kept = self._span_of(length, self.query_positions), self.query_positions
        if kept is None:
            return span.rows(selected, batch, self._masks)
        return matched(span.positions(selected, batch, self._masks), each_row(kept, batch), selected)

    def _key_positions(self, selected: Positions, entry: Entry, tower: str) -> Int[Tensor, "batch n"]:
        """Positions of the sequence whose keys a pattern has."""
        batch, length = entry.shape[0], entry.shape[3]
        if tower != "text":
            return resolve_positions(selected, batch, length, self._masks)
        positions = self._span_of(length, self.key_positions).keys(selected, batch, self._masks)
        if self.key_positions is not None:
            matched(positions, each_row(self.key_positions, batch), selected)
        return positions

    def positions(self, wanted: Positions, batch: int, length: int | None) -> Int[Tensor, "batch n"]:
        """Positions in any form as rows of activations, on the CPU; -1 where a sample has fewer than the others.

        Args:
            wanted: A token kind, a region or several, a mask, indices, one index, or a slice.
            batch: Number of samples.
            length: Rows of the activations; None where it is not known.
        """
        if batch < 1 or (length is not None and length < 0):
            raise LayoutError(f"Expected a batch of samples and rows; got {batch=}, {length=}.")
        kept = self.kept_positions
        if kept is not None and length == kept.shape[1] and is_token_kind(wanted) and self.span is not None:
            return matched(self.span.positions(wanted, batch, self._masks), each_row(kept, batch), wanted)
        if kept is None and self.span is not None and length == len(self.span):
            return self.span.rows(wanted, batch, self._masks)
        return resolve_positions(wanted, batch, length, self._masks)

    def row_mask(self, kind: TokenKind, batch: int) -> Bool[Tensor, "batch pos"] | None:
        """The mask of a token kind over the rows of this run; None without a layout."""
        if self._masks is None:
            return None
        if self.span is None:
            return each_row(self._masks(kind), batch)
        return self.span.mask(kind, batch, self._masks)[:, self.span.first :]


def matched(positions: Tensor, kept: Tensor, selected: object) -> Int[Tensor, "batch n"]:
    """Positions of the sequence as indices along an axis that has only the positions in `kept`."""
    match = positions[:, :, None] == kept.cpu()[:, None, :]
    if bool((~match.any(-1) & (positions >= 0)).any()):
        raise LayoutError(
            f"{selected!r} reaches positions that this run did not keep; it was made with `queries=`, `keys=` or "
            "`pos_slice=` that leave them out."
        )
    return torch.where(positions >= 0, match.int().argmax(-1), -1)

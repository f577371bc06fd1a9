"""The one resolver of positions: a name, a mask, indices, a slice or a region becomes positions of a sequence here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedConfig

from hooked_mllm.errors import LayoutError
from hooked_mllm.families.base import Family
from hooked_mllm.layout.regions import Region

#: what a token layout resolves: the name of a token kind ("question"), or a region or several, for the tokens that see
#: it
TokenKind = str | Region | Sequence[Region]
#: gives the mask of a token kind; every sample has at least one such token
KindMasks = Callable[[TokenKind], Bool[Tensor, "batch pos"]]
#: an index from the start, or a negative one from the end; True or False as an element of a mask
Index = int | np.integer | bool | np.bool_
if TYPE_CHECKING:
    #: every way to select positions: a token kind, a mask `[pos]` or `[batch pos]`, indices, one index, or a slice
    Positions = TokenKind | Index | slice | Sequence[Index] | Sequence[Sequence[Index]] | np.ndarray | Tensor
else:  # at run time anything, so that another value reaches `_tensor`, whose error states what was expected
    Positions = Any

EXPECTED = (
    "expected the name of a token kind such as 'question', a mask of True and False [pos] or [batch pos], indices, a "
    "slice, or a region (Box, Mask, Frames, Pages, Tube)"
)


def resolve_positions(
    selected: Positions, batch: int, length: int | None, masks: KindMasks | None
) -> Int[Tensor, "batch n"]:
    """Positions as indices on the CPU, `[batch n]`; -1 where a sample has fewer than the others.

    `length` is None where it is not known, and `masks` for inputs without a layout.
    """
    resolved = _resolved(selected, batch, length, masks)
    return indices_of(resolved) if resolved.dtype == torch.bool else resolved


def resolve_mask(selected: Positions, batch: int, length: int, masks: KindMasks | None) -> Bool[Tensor, "batch pos"]:
    """Positions as a mask on the CPU, `[batch pos]`; see `resolve_positions`."""
    resolved = _resolved(selected, batch, length, masks)
    return resolved if resolved.dtype == torch.bool else mask_of(resolved, length)


def indices_of(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch n"]:
    """The true positions of each sample in ascending order, -1 where a sample has fewer than the others."""
    counts = mask.sum(1)
    # a stable sort moves true positions to the front: [batch pos] -> [batch n]
    index = (~mask).int().argsort(dim=1, stable=True)[:, : int(counts.max())]
    return torch.where(torch.arange(index.shape[1]) < counts[:, None], index, -1)


def mask_of(index: Int[Tensor, "batch n"], length: int) -> Bool[Tensor, "batch pos"]:
    """The mask of indices, -1 for none."""
    # one more column takes the -1, and is cut off: [batch pos + 1] -> [batch pos]
    mask = torch.zeros(len(index), length + 1, dtype=torch.bool)
    return mask.scatter_(1, torch.where(index < 0, length, index), True)[:, :length]


def check_positions(selected: Positions) -> None:
    """Raise a LayoutError, before any run, for what `Positions` does not list."""
    if not (is_token_kind(selected) or isinstance(selected, slice)):
        _tensor(selected)


def check_every_sample(present: Bool[Tensor, " batch"], selected: Positions) -> None:
    """Raise a LayoutError that names the first sample of a batch without a selected position."""
    if not bool(present.all()):
        label = _shown(selected) if is_token_kind(selected) else "given"
        raise LayoutError(
            f"The {label} mask is empty for sample {int(present.int().argmin())} of the batch: every sample "
            "needs at least one such position. Give the sample what is missing, or select other positions."
        )


def describe_positions(selected: Positions | None) -> Any:
    """Positions as a record keeps them, of values that JSON can hold."""
    if selected is None or isinstance(selected, str):
        return selected
    if is_token_kind(selected):
        return repr(selected) if isinstance(selected, Region) else [repr(region) for region in selected]
    if isinstance(selected, slice):
        return f"{selected.start}:{selected.stop}:{selected.step}"
    index = _tensor(selected)
    if index.dtype == torch.bool:
        return {"mask": [*index.shape], "positions": int(index.sum())}
    return index.tolist()


def is_token_kind(selected: object) -> TypeGuard[TokenKind]:
    """Whether positions depend on a sample's layout: a name, a region, or a list of regions."""
    if isinstance(selected, str | Region):
        return True
    return isinstance(selected, Sequence) and len(selected) > 0 and all(isinstance(r, Region) for r in selected)


@dataclass(frozen=True)
class MappingMasks:
    """The token kinds that plain model inputs determine: visual, text, padding, last."""

    inputs: Mapping[str, Any]
    family: Family
    config: PreTrainedConfig

    def __call__(self, kind: TokenKind) -> Bool[Tensor, "batch pos"]:
        """The mask of one kind, on the device of the inputs."""
        tokens = self.inputs.get("input_ids")
        if tokens is None:
            raise LayoutError("Inputs without `input_ids` have no token kinds: use `model.prepare`.")
        ids = torch.tensor(self.family.visual_token_ids(self.config), device=tokens.device)
        visual = torch.isin(tokens, ids)
        attention = self.inputs.get("attention_mask")
        padding = torch.zeros_like(visual)
        if attention is not None and attention.dim() == 2:  # behind a KV cache, of all positions so far
            padding = attention[:, -tokens.shape[1] :] == 0
        if kind == "padding":
            return padding
        if kind == "visual":
            return visual
        if kind == "text":
            return ~visual & ~padding
        if kind == "last":
            index = torch.arange(tokens.shape[1], device=tokens.device).masked_fill(padding, -1)
            return index == index.max(dim=1, keepdim=True).values
        raise LayoutError(
            f"A plain mapping of model inputs has no token layout: {_shown(kind)} is not among its token kinds "
            "(visual, text, padding, last). Make a sample with `model.prepare(question, images=..., target=...)`."
        )


def _resolved(selected: object, batch: int, length: int | None, masks: KindMasks | None) -> Tensor:
    """A mask `[batch pos]`, or indices `[batch n]` from 0; on the CPU, checked."""
    if isinstance(selected, slice):
        return _of_slice(selected, length).expand(batch, -1)
    if not is_token_kind(selected):
        values = _tensor(selected).cpu()
    elif masks is not None:
        values = masks(selected).cpu()
    else:
        raise _error(selected, "these inputs have no token layout. Use `model.prepare`, or give positions as indices.")
    if values.dtype == torch.bool:
        return _checked_mask(values, selected, batch, length)
    return _checked_indices(values, selected, batch, length)


def _of_slice(selected: slice, length: int | None) -> Int[Tensor, " n"]:
    if length is None:
        raise _error(selected, "a slice needs a sequence of known length. Give indices from the start.")
    try:
        index = range(length)[selected]
    except (TypeError, ValueError) as error:
        raise _error(selected, f"{error}. Give whole numbers.") from None
    if not index:
        raise _error(selected, f"the slice is empty in a sequence of {length} tokens. Select at least one position.")
    return torch.tensor(index)


def _checked_mask(mask: Tensor, selected: object, batch: int, length: int | None) -> Bool[Tensor, "batch pos"]:
    # [pos] -> [batch pos]
    each = mask.expand(batch, -1) if mask.dim() == 1 else mask
    if each.dim() != 2 or each.shape[0] != batch or (length is not None and each.shape[1] != length):
        raise _error(
            selected,
            f"a mask must be [pos] or [batch pos], here {[batch, length]}; got {list(mask.shape)}. Make it of these "
            "inputs, padding included.",
        )
    if not bool(each.any()):
        raise _error(selected, "the mask is False everywhere. Select at least one position.")
    return each


def _checked_indices(index: Tensor, selected: object, batch: int, length: int | None) -> Int[Tensor, "batch n"]:
    if index.numel() > 2 and index.shape[-1] == length and bool(((index == 0) | (index == 1)).all()):
        raise _error(selected, "zeros and ones, one for each position, read like a mask: give mask.bool().")
    # one index, or [n] for all samples -> [batch n]
    each = index.reshape(1, -1) if index.dim() < 2 else index
    if each.dim() != 2 or each.shape[0] not in (1, batch):
        raise _error(selected, f"indices must be [n] or [batch n] of {batch} samples; got {list(index.shape)}.")
    if not each.numel():
        raise _error(selected, "there is no index. Select at least one position.")
    each = each.long().expand(batch, -1)
    if length is None:
        if bool((each < 0).any()):
            raise _error(selected, "negative indices need a sequence of known length. Count from the start.")
        return each
    if bool(((each < -length) | (each >= length)).any()):
        raise _error(selected, f"outside a sequence of {length} tokens. Give indices from {-length} to {length - 1}.")
    return torch.where(each < 0, each + length, each)


def _tensor(selected: object) -> Tensor:
    """Indices or a mask as a tensor."""
    allowed = isinstance(selected, int | np.integer | np.ndarray | Sequence | Tensor)
    if not allowed or isinstance(selected, bool | str | bytes):
        raise _error(selected, f"{EXPECTED}; got {type(selected).__name__}.")
    try:
        values = selected if isinstance(selected, Tensor) else torch.from_numpy(np.array(selected))
    except (TypeError, ValueError):  # ragged lists, texts and objects
        raise _error(selected, f"{EXPECTED}; got a {type(selected).__name__} of something else.") from None
    if not values.numel() and not isinstance(selected, Tensor):  # NumPy takes an empty list for floats
        values = values.long()
    if values.is_floating_point() or values.is_complex():
        advice = ": give mask.bool() for a mask" if values.dim() else ""
        raise _error(selected, f"{EXPECTED}; got numbers of {values.dtype}{advice}.")
    if values.dtype == torch.bool and not values.dim():
        raise _error(selected, f"{EXPECTED}; got one truth value.")
    return values


def _shown(selected: object) -> str:
    if isinstance(selected, Tensor | np.ndarray):
        return f"({selected.dtype} of shape {list(selected.shape)})"
    text = repr(selected)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _error(selected: object, problem: str) -> LayoutError:
    return LayoutError(f"Positions {_shown(selected)}: {problem}")

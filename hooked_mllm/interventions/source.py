"""Activations to put in place of a run's own: from a cache or tensors, brought to the shape of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_mllm.cache import ActivationCache, GenerationCache
from hooked_mllm.cache.lazy import value_of
from hooked_mllm.errors import HookedMLLMError, HookValueError, LayoutError
from hooked_mllm.hooks.table import is_quadratic
from hooked_mllm.inputs.positions import KindMasks, Positions, resolve_positions
from hooked_mllm.interventions.edited_positions import EditedPositions, for_batch

if TYPE_CHECKING:
    #: what a patch takes: a cache, a tensor, or a mapping of layers to tensors
    SourceLike = ActivationCache | GenerationCache | Tensor | Mapping[Any, Tensor]
else:  # at run time anything, so that another value reaches the error of `source_of`
    SourceLike = object


@dataclass
class Source:
    """Where the new values of a hook point come from."""

    given: ActivationCache | Tensor
    edited: EditedPositions  # the positions of the run that are replaced
    source_positions: Positions | None = None  # their positions in the source, in order; None for the same ones
    _compared: Any = None

    @property
    def masks(self) -> KindMasks | None:
        """The token kinds of the run that the source comes from; None where it has none."""
        return self.given._masks if isinstance(self.given, ActivationCache) and self.edited.tower == "text" else None

    def fit(self, name: str, x: Tensor, mask: Tensor, axis: int = 1) -> Tensor:
        """The source's values in the shape of `x`, in place at the positions that are replaced."""
        value = (self.given if isinstance(self.given, Tensor) else value_of(self.given.entry(name))).to(x)
        square = is_quadratic(name)
        self._check_shape(name, value, x, axis, square)
        if square:  # keys of a static cache, or generated since, of which the patch has none; or a part of a prompt
            empty = 0.0 if name.endswith("pattern") else torch.finfo(x.dtype).min
            value = torch.nn.functional.pad(value, (0, x.shape[-1] - value.shape[-1]), value=empty)
        if self.source_positions is None:
            self._check_positions(name, value, x, axis)
            offset = self.edited.offset(x.shape[axis])
            short = offset + x.shape[axis] - value.shape[axis]
            if short > 0:  # generated tokens, which are not replaced
                value = torch.cat([value, x.narrow(axis, x.shape[axis] - short, short)[: len(value)] * 0], dim=axis)
            value = value.narrow(axis, offset, x.shape[axis])
        if len(value) not in (1, len(x)):
            value = value.repeat_interleave(len(x) // len(value), dim=0)
        value = value.expand(len(x), *value.shape[1:])
        return value if self.source_positions is None else self._moved(name, value, x, mask, axis)

    def _check_shape(self, name: str, value: Tensor, x: Tensor, axis: int, square: bool) -> None:
        batch = len(x) if self.edited.inputs is None else self.edited.inputs.batch
        free = {0, axis} | ({3} if square else set())
        same = value.dim() == x.dim() and all(value.shape[i] == x.shape[i] for i in range(x.dim()) if i not in free)
        if not same or len(value) not in (1, batch, len(x)):
            raise HookValueError(
                f"The patch of {name} has shape {tuple(value.shape)}; this run has {tuple(x.shape)} there. Give an "
                "activation of the same point, of one sample or of the same number of samples."
            )

    def _check_positions(self, name: str, value: Tensor, x: Tensor, axis: int) -> None:
        inputs = self.edited.inputs
        length = self.edited.prompt_length(x.shape[axis])
        if self.edited.tower != "text":
            if value.shape[axis] != length or len(value) not in (1, len(x)):
                raise LayoutError(
                    f"The patch of {name} has {len(value)} x {value.shape[axis]} rows, this run {len(x)} x {length}: "
                    "the images are of other sizes."
                )
            return
        if self._compared is not inputs or value.shape[axis] != length:
            source_counts = _counts(self.masks, value.shape[axis], len(value))
            run_counts = _counts(None if inputs is None else inputs.host_masks, length, len(value))
            known = self.masks is not None and inputs is not None and not inputs.is_part
            if value.shape[axis] != length or (known and source_counts[1] != run_counts[1]):
                raise LayoutError(
                    f"The patch of {name} comes from a run of {source_counts[0]}; this run has {run_counts[0]}. Patch "
                    "between runs of the same layout, or specify corresponding positions by positions= and "
                    "source_positions=."
                )
            self._compared = inputs

    def _moved(self, name: str, value: Tensor, x: Tensor, mask: Tensor, axis: int) -> Tensor:
        assert self.source_positions is not None
        rows, masks, batch = x.shape[axis], self.masks, len(x)
        length, offset = self.edited.prompt_length(rows), self.edited.offset(rows)
        if length > rows:  # a part of a prompt
            mask = self.edited.prompt_mask(batch, length, mask.device)
        repeated = None if masks is None else lambda kind: for_batch(masks(kind), batch)
        index = resolve_positions(self.source_positions, batch, value.shape[axis], repeated)
        n_targets, n_sources = mask.sum(1).tolist(), (index >= 0).sum(1).tolist()
        if n_targets != n_sources:
            raise LayoutError(
                f"The patch of {name} has {n_sources} source positions for {n_targets} positions of this run (one "
                "number per sample); the numbers must be equal."
            )
        # the source position of each position of the run [batch pos]
        moved = torch.zeros(mask.shape, dtype=torch.long)
        moved[mask.cpu()] = index[index >= 0]
        moved = moved[:, offset : offset + rows] if length > rows else moved
        shape = [1] * x.dim()
        shape[0], shape[axis] = moved.shape
        return torch.take_along_dim(value, moved.view(shape).to(x.device), dim=axis)


def source_of(given: object) -> ActivationCache | Mapping[Any, Tensor] | Tensor:
    """What a patch may be given, a generation's cache by its prefill."""
    if isinstance(given, GenerationCache):
        return given.steps[0]
    if isinstance(given, Mapping) and not isinstance(given, ActivationCache):
        for key, value in given.items():
            if not isinstance(value, Tensor):
                raise HookValueError(
                    f"A mapping of layers to tensors has a {type(value).__name__} at {key!r}: torch.as_tensor(value) "
                    "makes a tensor of an array."
                )
    if isinstance(given, ActivationCache | Tensor | Mapping):
        return given
    raise HookValueError(
        f"A patch comes from a cache, a tensor, or a mapping of layers to tensors; got {type(given).__name__}."
    )


def _counts(masks: KindMasks | None, length: int, batch: int) -> tuple[str, list[list[int]]]:
    """The layout of a run in words, and each sample's numbers of real and visual tokens, once if all are equal."""
    if masks is None:
        return f"{length} tokens", []
    try:
        real = (~masks("padding")).sum(1).tolist()
        visual = masks("visual").sum(1).tolist()
    except HookedMLLMError:  # a prompt without an image
        real, visual = [length] * batch, [0] * batch
    pairs = [[n, v] for n, v in zip(real, visual, strict=True)]
    pairs = pairs[:1] if all(pair == pairs[0] for pair in pairs) else pairs
    return f"{' and '.join(f'{n} ({v} visual)' for n, v in pairs)} tokens", pairs

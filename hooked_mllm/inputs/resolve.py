"""What a model can be called with: a Sample, a batch of samples, or a plain mapping of transformers model inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.base import Family
from hooked_mllm.inputs.sample import Sample, SampleBatch, moved

ModelInput = Sample | SampleBatch | Mapping[str, Any]


@dataclass(frozen=True)
class ResolvedInput:
    """Model inputs on the model's device, and what is known of their positions.

    Attributes:
        tensors: Arguments of the transformers model.
        masks: `[batch pos]` booleans by the name of a token kind, on the device where the caller's inputs are.
        ids: Names of the samples, None where they have none.
        source: What the caller gave.
    """

    tensors: dict[str, Any]
    masks: Callable[[str], Bool[Tensor, "batch pos"]]
    ids: tuple[str | None, ...]
    source: ModelInput

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self._tokens())

    @property
    def length(self) -> int:
        """Positions in a sequence, padding included."""
        return self._tokens().shape[1]

    def _tokens(self) -> Tensor:
        tokens = self.tensors.get("input_ids")
        return self.tensors["inputs_embeds"] if tokens is None else tokens


def resolve_input(source: ModelInput, family: Family, config: Any, device: torch.device | str | None) -> ResolvedInput:
    """Check what the caller gave and bring it to the model.

    Raises:
        InputError: for nothing at all, for visual tokens without pixels, for pixels that are NaN, for a sample that was
            prepared by another family, or for another type.
    """
    if isinstance(source, Sample | SampleBatch):
        check_maker(source, family)
    if isinstance(source, Sample):
        return ResolvedInput(moved(source.inputs, device), source.mask, (source.id,), source)
    if isinstance(source, SampleBatch):
        ids = tuple(s.id for s in source)
        return ResolvedInput(moved(source.inputs, device), source.mask, ids, source)
    if not isinstance(source, Mapping):
        raise InputError(
            f"Expected a Sample, a SampleBatch or a mapping of model inputs; got {type(source).__name__}. "
            "`model.prepare(question, images=...)` makes a sample."
        )
    inputs = dict(source)
    check_mapping(inputs, family, config)
    if inputs.get("inputs_embeds") is not None:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].clone()  # what hooks edit in place is not the caller's
    count = len(inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"])
    masks = MappingMasks(inputs, family, config)
    return ResolvedInput(moved(inputs, device), masks, (None,) * count, source)


def check_maker(source: Sample | SampleBatch, family: Family) -> None:
    """Refuse samples of another family: its token ids and pixels mean something else here, if they fit at all."""
    for sample in (source,) if isinstance(source, Sample) else source:
        if sample.family not in (None, family.name):
            raise InputError(
                f"{sample.who} was prepared by a {sample.family} model; this one is {family.name}: prepare it again "
                "with this model."
            )


def check_mapping(inputs: dict[str, Any], family: Family, config: Any) -> None:
    """Refuse a mapping that the model would take and get wrong."""
    tokens = inputs.get("input_ids")
    if tokens is None and inputs.get("inputs_embeds") is None:
        raise InputError(f"The model inputs hold no `input_ids`; they hold {', '.join(inputs) or 'nothing'}.")
    if tokens is not None and (not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.numel() == 0):
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(f"`input_ids` must be a tensor [batch pos] with at least one token; got {shape}.")
    for name in family.pixel_inputs:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"`{name}` holds NaN or infinity: the image or its processing is damaged.")
    if tokens is not None and inputs.get("mm_encoder_outputs") is None and inputs.get("past_key_values") is None:
        for token, name in zip(family.visual_token_ids(config), family.pixel_inputs, strict=True):
            count = int((tokens == token).sum())
            if count and inputs.get(name) is None:
                raise InputError(
                    f"The prompt holds {count} visual tokens (id {token}) but no `{name}` came with it: the model "
                    "would run on empty placeholders. Pass everything that the processor returns."
                )
    family.check_inputs(inputs, config)


@dataclass(frozen=True)
class MappingMasks:
    """The kinds of position that bare model inputs tell: visual, text, padding, last."""

    inputs: Mapping[str, Any]
    family: Family
    config: Any

    def __call__(self, name: str) -> Bool[Tensor, "batch pos"]:
        """Positions of one kind."""
        tokens = self.inputs.get("input_ids")
        if tokens is None:
            raise LayoutError("Inputs without `input_ids` say nothing of their positions; use `model.prepare`.")
        ids = torch.tensor(self.family.visual_token_ids(self.config), device=tokens.device)
        visual = torch.isin(tokens, ids)
        attention = self.inputs.get("attention_mask")
        padding = torch.zeros_like(visual) if attention is None or attention.dim() != 2 else attention == 0
        if name == "padding":
            return padding
        if name == "visual":
            return visual
        if name == "text":
            return ~visual & ~padding
        if name == "last":
            place = torch.arange(tokens.shape[1], device=tokens.device).masked_fill(padding, -1)
            return place == place.max(dim=1, keepdim=True).values
        raise LayoutError(
            f"These model inputs do not say which tokens are {name!r} (a plain mapping tells visual, text, padding and "
            "last). Make a sample with `model.prepare(question, images=..., target=...)`."
        )

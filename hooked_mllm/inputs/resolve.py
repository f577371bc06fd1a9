"""What a model can be called with, one input or several: coerced here, checked, and moved to the model's device."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedConfig

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.families.base import Family
from hooked_mllm.inputs.positions import KindMasks, MappingMasks, Positions, TokenKind, resolve_mask, resolve_positions
from hooked_mllm.inputs.sample import Sample, SampleBatch, moved
from hooked_mllm.layout import TokenLayout

if TYPE_CHECKING:
    #: a Sample, a batch of samples, or a plain mapping of transformers model inputs, such as a `BatchFeature`
    ModelInput = Sample | SampleBatch | Mapping[str, Any]
    #: one model input, or several: a list, or an iterator that makes them as they are needed
    ModelInputs = ModelInput | Iterable[ModelInput]
    #: what runs at once: one model input, or a list of samples, which is a batch padded on the left
    RunInput = ModelInput | Sequence[Sample]
else:  # at run time anything, so that another value reaches `check_model_input`, whose error states what was expected
    ModelInput = ModelInputs = RunInput = Any

T = TypeVar("T")

_ADVICE = "`model.prepare(question, images=...)` makes a sample."


def is_model_input(value: object) -> TypeGuard[ModelInput]:
    """Whether a value is one model input: a Sample, a SampleBatch or a mapping."""
    return isinstance(value, Sample | SampleBatch | Mapping)


def each_sample(samples: ModelInputs) -> Iterator[ModelInput]:
    """Model inputs one after another, unchanged; an iterator is read as far as its inputs are needed."""
    return _each_sample(samples)


def _each_sample(samples: object) -> Iterator[ModelInput]:  # any object, so that a wrong one reaches our own error
    return iter((samples,)) if is_model_input(samples) else each_element(samples, check_model_input)


def as_samples(samples: ModelInputs, purpose: str = "run") -> list[ModelInput]:
    """`each_sample` as a list of at least one; `purpose` completes the message for an empty list."""
    collected = list(_each_sample(samples))
    if not collected:
        raise no_sample(purpose)
    return collected


def each_prepared(samples: ModelInputs) -> Iterator[Sample]:
    """Samples one after another, those of a batch by themselves; an InputError for a mapping."""
    return (sample for source in _each_sample(samples) for sample in prepared_samples(source))


def sample_count(samples: ModelInputs) -> int | None:
    """The number of inputs that `each_sample` gives; None for an iterator without a length."""
    if is_model_input(samples):
        return 1
    return len(samples) if isinstance(samples, Sized) else None


def each_element(samples: object, check: Callable[[Any, str], T]) -> Iterator[T]:
    """`check(element, name)` of each element, when it is reached."""
    numeric = isinstance(samples, np.ndarray) and samples.dtype != object
    if numeric or isinstance(samples, str | bytes | Tensor) or not isinstance(samples, Iterable):
        raise InputError(
            "Expected a Sample, a SampleBatch, a mapping of model inputs, or an iterable of these; got "
            f"{type(samples).__name__}. {_ADVICE}"
        )
    return (check(sample, f"sample {number}") for number, sample in enumerate(samples))


def no_sample(purpose: str) -> InputError:
    """The error for an empty set of samples."""
    return InputError(f"There is no sample to {purpose}: `samples` is empty.")


def check_model_input(value: object, name: str = "") -> ModelInput:
    """The value, if it is one model input; `name` is what the message calls it."""
    if is_model_input(value):
        return value
    raise InputError(
        f"Expected a Sample, a SampleBatch or a mapping of model inputs{f' for {name}' if name else ''}; got "
        f"{type(value).__name__}. {_ADVICE}"
    )


def as_run_input(source: object) -> ModelInput:
    """One model input; of a list of samples, a batch padded on the left."""
    if isinstance(source, Sequence) and source and all(isinstance(sample, Sample) for sample in source):
        return SampleBatch.collate(source)
    return check_model_input(source)


def samples_of(source: ModelInput) -> tuple[Sample, ...]:
    """The samples of an input; none for a mapping."""
    if isinstance(source, Sample):
        return (source,)
    return source.samples if isinstance(source, SampleBatch) else ()


def prepared_samples(source: ModelInput) -> tuple[Sample, ...]:
    """The samples of an input; an InputError for a mapping, which has no token layout."""
    samples = samples_of(source)
    if not samples:
        raise InputError(
            "Expected samples, as `model.prepare(question, images=..., answer=...)` makes them; got "
            f"{type(source).__name__}. A plain mapping of model inputs has no token layout."
        )
    return samples


def tensors_of(source: ModelInput) -> Mapping[str, Any]:
    """Arguments of the transformers model."""
    return source.inputs if isinstance(source, Sample | SampleBatch) else source


def sequence_count(source: ModelInput) -> int:
    """Sequences of an input: 1 for a Sample, those of the batch for others."""
    return len(_tokens(tensors_of(source)))


def _tokens(tensors: Mapping[str, Any]) -> Tensor:
    """Token ids `[batch pos]`, or embeddings `[batch pos d_model]`."""
    for name, axes in (("input_ids", "[batch pos]"), ("inputs_embeds", "[batch pos d_model]")):
        value = tensors.get(name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.dim() != len(axes.split()) or not value.numel():
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"`{name}` must be a tensor {axes} with at least one token; got {shape}.")
        return value
    raise InputError(f"The model inputs hold no `input_ids`; they hold {', '.join(map(str, tensors)) or 'nothing'}.")


@checked
@dataclass(frozen=True)
class ResolvedInput:
    """Model inputs on the model's device, and the token kinds of their positions.

    Attributes:
        tensors: Arguments of the transformers model.
        masks: `[batch pos]` booleans of a token kind or region, on the device of the caller's inputs.
        ids: Names of the samples, None where they have none.
        source: The input before it was resolved.
    """

    tensors: dict[str, Any]
    masks: KindMasks
    ids: tuple[str | int | None, ...]
    source: ModelInput

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(_tokens(self.tensors))

    @property
    def length(self) -> int:
        """Positions in a sequence, padding included."""
        return _tokens(self.tensors).shape[1]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples; none for a mapping."""
        return samples_of(self.source)

    @property
    def layouts(self) -> tuple[TokenLayout, ...] | None:
        """The layout of each sequence with its padding; None for a mapping."""
        if isinstance(self.source, SampleBatch):
            return self.source.layouts
        return (self.source.layout,) if isinstance(self.source, Sample) else None

    @property
    def host_masks(self) -> KindMasks:
        """`masks` on the CPU, where those of samples are made, so that no device is waited for."""
        return self.source.host_mask if isinstance(self.source, Sample | SampleBatch) else self.masks

    @property
    def padding(self) -> Bool[Tensor, "batch pos"]:
        """Padding positions, on the CPU; none is no error."""
        return self.host_masks("padding").cpu()

    def positions(self, selected: Positions) -> Int[Tensor, "batch n"]:
        """Positions as indices on the CPU; -1 where a sample has fewer than the others.

        Args:
            selected: A token kind, a region or several, a mask, indices, one index, or a slice.

        Raises:
            LayoutError: For positions that these inputs do not have.
            InputError: For the answer or target of a sample that has none.
        """
        return resolve_positions(selected, self.batch, self.length, self.host_masks)

    def mask(self, selected: Positions) -> Bool[Tensor, "batch pos"]:
        """Positions as a mask on the CPU; arguments and errors are those of `positions`."""
        return resolve_mask(selected, self.batch, self.length, self.host_masks)

    @property
    def is_part(self) -> bool:
        """Whether the inputs continue from `past_key_values`, so that they may be a part of a prompt."""
        return self.tensors.get("past_key_values") is not None

    def part_mask(self, selected: TokenKind, first: int, prompt_length: int) -> Bool[Tensor, "batch prompt"]:
        """The positions of a token kind in a prompt of which these inputs are the part that begins at `first`.

        Raises:
            InputError: For a kind that the tokens of a part of a prompt do not decide.
        """
        if self.length == prompt_length:  # all tokens, of which `generate` runs those that are not in the KV cache
            return self.masks(selected).cpu()
        mask = torch.zeros(self.batch, prompt_length, dtype=torch.bool)
        if selected == "last":
            mask[:, -1] = True
        elif selected == "visual":
            mask[:, first : first + self.length] = self.masks("visual").cpu()
        else:
            self.check_whole()
        return mask

    def check_whole(self) -> None:
        """Raise an InputError for inputs that continue from `past_key_values`, with positions not from 0."""
        if self.tensors.get("past_key_values") is not None:
            raise InputError(
                "Positions count from the start of the prompt, and these inputs continue from `past_key_values`: give "
                "the whole sequence, or use `model.generate`."
            )


def resolve_input(
    source: RunInput, family: Family, config: PreTrainedConfig, device: torch.device | str | None
) -> ResolvedInput:
    """Check one model input and move it to the model's device; None leaves it where it is."""
    source = as_run_input(source)
    if isinstance(source, Sample | SampleBatch):
        check_maker(source, family)
        ids = tuple(sample.id for sample in samples_of(source))
        return ResolvedInput(moved(source.inputs, device), source.mask, ids, source)
    inputs = dict(source)
    check_mapping(inputs, family, config)
    if inputs.get("inputs_embeds") is not None:
        inputs["inputs_embeds"] = inputs["inputs_embeds"].clone()  # hooks edit it in place; the caller's stays
    masks = MappingMasks(inputs, family, config)
    return ResolvedInput(moved(inputs, device), masks, (None,) * sequence_count(inputs), source)


def check_maker(source: Sample | SampleBatch, family: Family) -> None:
    """Raise an InputError for samples of another family, whose token ids and pixels mean something else."""
    for sample in samples_of(source):
        if sample.family not in (None, family.name):
            raise InputError(
                f"{sample.who} was prepared by a {sample.family} model; this one is {family.name}: prepare it again "
                "with this model."
            )


def check_mapping(inputs: dict[str, Any], family: Family, config: PreTrainedConfig) -> None:
    """Raise an InputError for a mapping that the model would accept, with wrong results."""
    _tokens(inputs)
    tokens = inputs.get("input_ids")
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

"""Corruption, the base class: a sample is prepared again with one change."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any, overload

import numpy as np
import torch

from hooked_mllm.checks import checked
from hooked_mllm.corruptions.pair import check_pair
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Prepares, Sample, SampleBatch


@checked
class Corruption(ABC):
    """Makes the corrupted counterpart of a sample.

    The model's own processor prepares the sample again with one change: of its pictures, in their original pixels, or
    of its question. A subclass returns the changed arguments in `changes`, and its settings in `describe`. Random
    numbers depend on the seed and the sample, so that the order of the samples does not matter.

    Attributes:
        same_length: Whether the counterpart must have the same number and kinds of tokens as the sample; it is checked.

    Examples:
        >>> from PIL import ImageOps
        >>> from hooked_mllm import HookedMLLM, corruptions, toys
        >>> class Mirror(corruptions.Corruption):
        ...     def changes(self, sample):
        ...         return {"images": [ImageOps.mirror(image) for image in sample.images]}
        ...     def describe(self):
        ...         return {"corruption": "Mirror"}
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> len(Mirror()(model, sample)) == len(sample)
        True
    """

    same_length: bool = True

    @overload
    def __call__(self, model: Prepares, sample: Sample) -> Sample: ...

    @overload
    def __call__(self, model: Prepares, sample: SampleBatch) -> SampleBatch: ...

    def __call__(self, model: Prepares, sample: Sample | SampleBatch) -> Sample | SampleBatch:
        """The corrupted counterpart of a sample, or of each sample of a batch.

        Args:
            model: The `HookedMLLM` that the sample was prepared by.
            sample: A sample or a batch, made by `prepare`.

        Raises:
            InputError: For another sample, or a change that the model does not see.
            LayoutError: For a region that the sample lacks, or a counterpart with other tokens.
        """
        if isinstance(sample, SampleBatch):
            return SampleBatch.collate([self(model, each) for each in sample], sample.padding_side)
        corrupted = prepared_again(model, sample, self.changes(sample))
        if self.same_length:
            check_pair(sample, corrupted)
        inputs, others = sample.inputs, corrupted.inputs
        if inputs.keys() == others.keys() and all(torch.equal(inputs[name], others[name]) for name in inputs):
            raise InputError(f"{self!r} changes nothing in the model inputs: the processor gives the same tensors.")
        return corrupted

    @abstractmethod
    def changes(self, sample: Sample) -> dict[str, Any]:
        """Arguments of `prepare` that replace the sample's own: "images", "videos", "question"."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""

    def __repr__(self) -> str:
        settings = {k: v for k, v in self.describe().items() if k != "corruption" and v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def prepared_again(model: Prepares, sample: Sample, changes: dict[str, Any]) -> Sample:
    """The sample as `prepare` makes it with `changes`, on the same device and in the same dtype."""
    how = sample.preparation
    if how is None:
        raise InputError(
            "This sample has no record of its preparation, so it cannot be prepared again with a change: make it with "
            "`model.prepare(question, images=...)`."
        )
    arguments = {name: getattr(sample, name) for name in ("question", "answer", "target", "id")}
    arguments |= {"images": list(sample.images) or None, "videos": list(sample.videos) or None}
    arguments |= {"system": how.system, "min_overlap": how.min_overlap, "padding_side": how.padding_side}
    arguments |= changes
    again = model.prepare(**arguments, **how.processor)
    if again.template != sample.template:
        raise InputError(
            "The sample was prepared with another chat template than this model's: use the model that prepared it."
        )
    pixels = next((v.dtype for v in sample.inputs.values() if v.is_floating_point()), None)
    return again.to(sample.device, pixels)


def drawing(seed: int, sample: Sample) -> np.random.Generator:
    """Random numbers that depend on the seed and on the sample's question and pictures alone."""
    content = hashlib.sha256(sample.question.encode())
    for image in sample.images:
        content.update(image.tobytes())
    for video in sample.videos:
        content.update(np.ascontiguousarray(video.frames).tobytes())
    return np.random.default_rng([seed, int.from_bytes(content.digest()[:8], "little")])


def described_function(value: object) -> object:
    """The value, or the name of a function."""
    return f"function {getattr(value, '__qualname__', type(value).__name__)}" if callable(value) else value


def check_seed(seed: object) -> None:
    """Raise an InputError for anything but an integer from 0."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed is an integer from 0; got {seed!r}.")

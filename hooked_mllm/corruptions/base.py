"""What every corruption is: a sample prepared again with one thing changed."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch

from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import check_pair
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Sample, SampleBatch


class Corruption(ABC):
    """Makes the corrupted counterpart of a sample.

    The sample is prepared again by the model's own processor with one thing changed: its pictures, in their original
    pixels, or its question. System text, answer, target, id and options stay. A subclass says in `changes` what is
    changed, and in `describe` what it does. What is drawn at random is drawn by the seed and the sample, so that the
    order of the samples does not matter.

    Attributes:
        same_length: Whether the counterpart must have the sample's tokens; it is then checked that it has.

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
        >>> corrupted = Mirror()(model, sample)
        >>> corrupted.answer == sample.answer, len(corrupted) == len(sample)
        (True, True)
    """

    same_length: bool = True

    def __call__(self, model: Model, sample: Any) -> Any:
        """The corrupted counterpart of a sample, or of each sample of a batch.

        Args:
            model: The `HookedMLLM` that the sample was prepared by.
            sample: A `Sample`, or a `SampleBatch`.

        Raises:
            InputError: for a sample that was not made by `prepare`, or a change that the model does not see.
            LayoutError: for a region that the sample lacks, or a counterpart with other tokens.
        """
        if isinstance(sample, SampleBatch):
            return SampleBatch.collate([self(model, one) for one in sample], sample.padding_side)
        if not isinstance(sample, Sample):
            raise InputError(
                f"A corruption takes a Sample, which remembers its question and pictures; got {type(sample).__name__}. "
                "Make samples with `model.prepare(question, images=...)`."
            )
        corrupted = prepared_again(model, sample, self.changes(sample))
        if self.same_length:
            check_pair(sample, corrupted)
        if _equal(sample, corrupted):
            raise InputError(f"{self!r} changes nothing that the model sees: the processor gives the same inputs.")
        return corrupted

    @abstractmethod
    def changes(self, sample: Sample) -> dict[str, Any]:
        """Arguments of `prepare` that take the place of the sample's own: "images", "videos", "question"."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it does, as values that JSON can hold."""

    def __repr__(self) -> str:
        told = {k: v for k, v in self.describe().items() if k != "corruption" and v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in told.items())})"


def prepared_again(model: Model, sample: Sample, changes: dict[str, Any]) -> Sample:
    """The sample as `prepare` makes it with `changes`, on the same device and in the same dtype.

    Raises:
        InputError: for a sample that was not made by `prepare`, or by a model with another chat template.
    """
    how = sample.preparation
    if how is None:
        raise InputError(
            "This sample does not remember how it was prepared, so it cannot be prepared again with a change: make it "
            "with `model.prepare(question, images=...)`."
        )
    given = {
        "question": sample.question,
        "images": list(sample.images) or None,
        "videos": list(sample.videos) or None,
        "system": how.system,
        "answer": sample.answer,
        "target": sample.target,
        "id": sample.id,
        "min_overlap": how.min_overlap,
    }
    again = model.prepare(**{**given, **changes}, **how.processor)
    if again.template != sample.template:
        raise InputError(
            "The sample was prepared with another chat template than this model's: use the model that prepared it."
        )
    pixels = next((v.dtype for v in sample.inputs.values() if v.is_floating_point()), None)
    return again.to(sample.device, pixels)


def drawing(seed: int, sample: Sample) -> np.random.Generator:
    """Random numbers that depend on the seed and on the sample's question and pictures, and on nothing else."""
    content = hashlib.sha256(sample.question.encode())
    for image in sample.images:
        content.update(image.tobytes())
    for video in sample.videos:
        content.update(np.ascontiguousarray(video.frames).tobytes())
    return np.random.default_rng([seed, int.from_bytes(content.digest()[:8], "little")])


def check_seed(seed: Any) -> None:
    """Refuse what cannot be a seed.

    Raises:
        InputError: for anything but an integer from 0.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed is an integer from 0; got {seed!r}.")


def _equal(sample: Sample, corrupted: Sample) -> bool:
    ours, theirs = sample.inputs, corrupted.inputs
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

"""Pairs of a clean and a corrupted sample: coerced and checked for positions that correspond."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.resolve import ModelInput, check_model_input, each_element, is_model_input, no_sample
from hooked_mllm.inputs.sample import Sample, SampleBatch

if TYPE_CHECKING:
    #: a clean sample and its corrupted counterpart, or batches of them
    Pair = tuple[Sample, Sample] | tuple[SampleBatch, SampleBatch]
    #: one pair, or several
    Pairs = Pair | Iterable[Pair]
else:  # at run time anything, so that another value reaches the error of `as_pairs`
    Pair = Pairs = object


def as_pairs(pairs: Pairs) -> list[tuple[Sample | SampleBatch, Sample | SampleBatch]]:
    """One pair (clean, corrupted) or an iterable of pairs as a list, each checked for positions that correspond."""
    candidates = (pairs,) if _is_pair(pairs) else pairs
    if is_model_input(candidates) or isinstance(candidates, str) or not isinstance(candidates, Iterable):
        raise _no_pair(candidates)
    checked = []
    for pair in cast("Iterable[Any]", candidates):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise _no_pair(pair)
        clean, corrupted = pair
        check_pair(clean, corrupted)
        checked.append((clean, corrupted))
    if not checked:
        raise InputError("There is no pair to patch: `pairs` is empty.")
    return checked


def as_samples_or_pairs(items: object, purpose: str = "run") -> list[tuple[ModelInput, ModelInput | None]]:
    """Model inputs, or pairs of them, as a list of (clean, corrupted); the second is None where there is no pair.

    `purpose` completes the message for an empty list.
    """
    single = is_model_input(items) or _is_pair(items)
    collected = list(each_element((items,) if single else items, _sample_or_pair))
    if not collected:
        raise no_sample(purpose)
    return collected


@checked
def check_pair(clean: object, corrupted: object) -> None:
    """Reject a pair whose positions do not correspond: patching replaces position i of one run by i of the other.

    Both must have the same number of tokens, and at each position the same kind of token, of the same image or video.

    Args:
        clean: A sample, or a batch.
        corrupted: Its counterpart.

    Raises:
        LayoutError: Naming both layouts.
        InputError: For something else than samples or batches of one size.

    Examples:
        >>> from hooked_mllm import HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> pair = [toys.VisualRetrieval(pages=n).samples(model, 1)[0] for n in (1, 2)]
        >>> check_pair(*pair)
        Traceback (most recent call last):
        hooked_mllm.errors.LayoutError: The pair does not correspond: ...
    """
    if isinstance(clean, SampleBatch) and isinstance(corrupted, SampleBatch):
        if len(clean) != len(corrupted):
            raise InputError(f"Expected {len(clean)} corrupted samples, one for each clean one; got {len(corrupted)}.")
        for sample, counterpart in zip(clean, corrupted, strict=True):
            check_pair(sample, counterpart)
        return
    if not (isinstance(clean, Sample) and isinstance(corrupted, Sample)):
        raise InputError(
            f"A pair is two Samples or two SampleBatches; got {type(clean).__name__} and {type(corrupted).__name__}."
        )
    layout, other = clean.layout, corrupted.layout
    if len(layout) != len(other):
        difference = f"{len(layout)} tokens against {len(other)}"
    else:
        differs = (layout.kinds != other.kinds) | (layout.item != other.item)
        if not bool(differs.any()):
            return
        difference = f"position {int(torch.nonzero(differs)[0])} is another kind of token"
    raise LayoutError(
        f"The pair does not correspond: {difference}. Clean: {layout!r}. Corrupted: {other!r}. Pictures of one size "
        "and questions of the same number of tokens give layouts that do."
    )


def _sample_or_pair(value: object, name: str) -> tuple[ModelInput, ModelInput | None]:
    return value if _is_pair(value) else (check_model_input(value, name), None)


def _is_pair(value: object) -> TypeGuard[tuple[ModelInput, ModelInput]]:
    return isinstance(value, tuple) and len(value) == 2 and all(map(is_model_input, value))


def _no_pair(value: object) -> InputError:
    return InputError(
        f"Expected pairs (clean sample, corrupted sample); got {type(value).__name__}. A corruption makes the second: "
        "`(sample, BlurRegion(sigma=8)(model, sample))`."
    )

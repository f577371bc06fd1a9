"""`check_pair`: whether two samples can be patched into one another, position by position."""

from typing import Any

import torch

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.sample import Sample, SampleBatch


def check_pair(clean: Any, corrupted: Any) -> None:
    """Refuse a pair whose positions do not correspond: patching puts position i of one run in place of i of the other.

    Both must have as many tokens, and at each position the same kind of token, of the same image or video.

    Args:
        clean: A sample, or a batch.
        corrupted: Its counterpart.

    Raises:
        LayoutError: naming both layouts.
        InputError: for something else than samples or batches of one size.

    Examples:
        >>> from hooked_mllm import HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> one, two = (toys.VisualRetrieval(pages=n).samples(model, 1)[0] for n in (1, 2))
        >>> check_pair(one, two)
        Traceback (most recent call last):
        hooked_mllm.errors.LayoutError: The pair does not correspond: ...
    """
    if isinstance(clean, SampleBatch) and isinstance(corrupted, SampleBatch):
        if len(clean) != len(corrupted):
            raise InputError(f"Expected as many corrupted samples as clean ones, {len(clean)}; got {len(corrupted)}.")
        for one, other in zip(clean, corrupted, strict=True):
            check_pair(one, other)
        return
    if not (isinstance(clean, Sample) and isinstance(corrupted, Sample)):
        raise InputError(
            f"A pair is two Samples or two SampleBatches; got {type(clean).__name__} and {type(corrupted).__name__}."
        )
    ours, theirs = clean.layout, corrupted.layout
    if len(ours) != len(theirs):
        what = f"{len(ours)} tokens against {len(theirs)}"
    else:
        apart = (ours.kinds != theirs.kinds) | (ours.item != theirs.item)
        if not bool(apart.any()):
            return
        what = f"position {int(torch.nonzero(apart)[0])} is another kind of token"
    raise LayoutError(
        f"The pair does not correspond: {what}. Clean: {ours!r}. Corrupted: {theirs!r}. Pictures of one size and "
        "questions of as many tokens give layouts that do."
    )

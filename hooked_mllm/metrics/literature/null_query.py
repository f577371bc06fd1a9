"""The null query: the same prompt with an empty question, to subtract attention that no question changes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ModelInputs, each_prepared
from hooked_mllm.inputs.sample import Sample, SampleBatch, is_per_token
from hooked_mllm.layout import Kind, TokenLayout, View
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.shared_prefix import SharedPrefix


@checked
@dataclass(frozen=True)
class NullQuery:
    """Replaces each sample's question by a text without a question.

    The tokens before the question keep their positions and keys, and `model.measure` runs them once for both prompts
    (see `SharedPrefix`), or, with hooks or interventions on the model, runs both prompts whole.

    Args:
        text: The text in place of the question.
        reuse_prefix: False: plain batches, padded on the left, of which every prompt is run whole.

    Source: arXiv:2506.09944 (QRHead, calibration with "N/A"); arXiv:2605.27243.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> pairs = metrics.NullQuery().pairs(model, toys.VisualRetrieval().samples(model, 2))
        >>> model.measure(pairs, metrics.MMRetHeads(), progress=False).shape
        (6, 8)
    """

    text: str = "N/A"
    reuse_prefix: bool = True

    def sample(self, model: Model, sample: Sample) -> Sample:
        """The sample with the null question, without answer.

        Raises:
            InputError: If the text has no tokens, the question is in pieces, or a target token comes after it.
        """
        ids = model.processor.tokenizer(self.text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        if not ids.shape[-1]:
            raise InputError(f"The null query {self.text!r} has no tokens.")
        spans = sample.layout.spans("question")
        if len(spans) != 1:
            raise InputError(f"The question must be one run of tokens to be replaced; it is {len(spans)}.")
        (start, end), layout, target = spans[0], sample.layout, sample.target_mask
        if target is not None and bool(target[start:].any()):
            raise InputError("The target comes after the question: its tokens would not keep their positions.")
        stop, width = layout.last_index + 1, ids.shape[1]

        def spliced(values: Tensor, fill: Any) -> Tensor:
            """`[pos ...]` up to the prompt's end, with `fill` at the null question's tokens."""
            return torch.cat([values[:start], values.new_full((width, *values.shape[1:]), fill), values[end:stop]])

        per_token = {
            name: spliced(value[0], int(name == "attention_mask"))[None]
            for name, value in sample.inputs.items()
            if is_per_token(value, len(sample))
        }
        per_token["input_ids"][:, start : start + width] = ids
        null_layout = TokenLayout(
            spliced(layout.kinds, int(Kind.QUESTION)),
            spliced(layout.item, -1),
            spliced(layout.boxes, torch.nan),
            spliced(layout.frame_range, -1),
            spliced(layout.view, int(View.NONE)),
            layout.items,
            layout.last_index + width - (end - start),
        )
        null_target = None if target is None else spliced(target, False)
        inputs = {**sample.inputs, **per_token}
        changed = {"inputs": inputs, "layout": null_layout, "question": self.text, "target_mask": null_target}
        return replace(sample, answer=None, id=None, **changed)

    def pairs(self, model: Model, samples: ModelInputs) -> Iterator[SampleBatch]:
        """Each sample and its null query as a batch of two, for calibrated metrics.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers; one, or an iterable of them.
        """
        for sample in each_prepared(samples):
            if sample.answer is not None:
                raise InputError("A calibrated score compares questions: prepare the samples without answer=.")
            pair = [sample, self.sample(model, sample)]
            yield SharedPrefix.collate(pair) if self.reuse_prefix else SampleBatch.collate(pair)


def before_questions(view: AttentionView) -> Bool[Tensor, "batch pos"]:
    """The positions before each prompt's question, without padding; on the CPU."""
    return (~view.mask("padding") & (view.question.int().cummax(1).values == 0)).cpu()


def check_pairs(view: AttentionView) -> None:
    """Raise for a batch that does not consist of (sample, null query) pairs."""
    advice = "Measure on `NullQuery().pairs(model, samples)`."
    if view.batch % 2:
        raise InputError(f"A calibrated score needs pairs of a sample and its null query; got {view.batch}. {advice}")
    before, target, tokens = before_questions(view), view.target.cpu(), view.context.tokens.cpu()
    prefixes = [(tokens[row][before[row]], target[row][before[row]]) for row in range(view.batch)]
    for number in range(0, view.batch, 2):
        (ids, mask), (null_ids, null_mask) = prefixes[number : number + 2]
        complete = bool((target[number : number + 2].sum(1) == mask.sum()).all())  # no target token after the question
        if not (complete and torch.equal(ids, null_ids) and torch.equal(mask, null_mask)):
            raise InputError(
                f"Samples {number} and {number + 1} of the batch are no pair: up to the question they must be the same "
                f"tokens with the same target. {advice}"
            )

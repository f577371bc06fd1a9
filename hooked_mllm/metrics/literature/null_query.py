"""The null query: the same prompt with an empty question, to subtract attention that no question changes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ModelInputs, each_prepared
from hooked_mllm.inputs.sample import Sample, SampleBatch, is_per_token
from hooked_mllm.layout import Kind, TokenLayout, View
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.shared_prefix import SharedPrefix


@dataclass(frozen=True)
class NullQuery:
    """Replaces each sample's question by a text without a question.

    The tokens before the question stay as they are, so that every visual token has the position and the key it had; the
    question's own are replaced by those of `text`, and all behind them move. `model.measure` therefore runs the tokens
    before the question once for both prompts (see `SharedPrefix`); with hooks or interventions on the model, both
    prompts are run whole.

    Args:
        text: The text in place of the question.
        reuse_prefix: False makes plain batches, padded on the left, of which every prompt is run whole.

    Source: arXiv:2506.09944 (QRHead, calibration with "N/A"); arXiv:2605.27243.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics
        >>> from hooked_mllm.toys import VisualRetrieval
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> samples = VisualRetrieval().samples(model, 2)
        >>> pairs = metrics.NullQuery().pairs(model, samples)
        >>> model.measure(pairs, metrics.MMRetHeads(), progress=False).shape == (model.cfg.n_layers, model.cfg.n_heads)
        True
    """

    text: str = "N/A"
    reuse_prefix: bool = True

    def sample(self, model: Model, sample: Sample) -> Sample:
        """The sample with the null question; its answer is dropped.

        Raises:
            InputError: if the text has no tokens, the question is in pieces, or a target token comes after it.
        """
        ids = model.processor.tokenizer(self.text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        if not ids.shape[-1]:
            raise InputError(f"The null query {self.text!r} has no tokens.")
        spans = sample.layout.spans("question")
        if len(spans) != 1:
            raise InputError(f"The question must be one run of tokens to be replaced; it is {len(spans)}.")
        start, end = spans[0]
        target = sample.target_mask
        if target is not None and bool(target[start:].any()):
            raise InputError("The target comes after the question: its tokens would not keep their positions.")
        stop = sample.layout.last_index + 1
        n, width = len(sample), ids.shape[1]
        inputs: dict[str, Tensor] = {}
        for name, value in sample.inputs.items():
            if is_per_token(value, n):
                new = ids if name == "input_ids" else torch.full_like(ids, int(name == "attention_mask"))
                value = torch.cat([value[:, :start], new.to(value), value[:, end:stop]], dim=1)
            inputs[name] = value
        return replace(
            sample,
            inputs=inputs,
            layout=_spliced(sample.layout, start, end, stop, width),
            question=self.text,
            answer=None,
            target_mask=None if target is None else _cut(target, start, end, stop, width, False),
            id=None,
        )

    def pairs(self, model: Model, samples: ModelInputs) -> Iterator[SampleBatch]:
        """Each sample and its null query as a batch of two, which is what the calibrated metrics are measured on.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers; one, or an iterable of them.

        Raises:
            InputError: for samples with answers, or inputs that are no samples.
        """
        for sample in each_prepared(samples):
            if sample.answer is not None:
                raise InputError("A calibrated score compares questions: prepare the samples without answer=.")
            pair = [sample, self.sample(model, sample)]
            yield SharedPrefix.collate(pair) if self.reuse_prefix else SampleBatch.collate(pair)


def check_pairs(view: AttentionView) -> None:
    """Raise for a batch that does not consist of (sample, null query) pairs.

    Raises:
        InputError: naming the first that does not match.
    """
    advice = "Measure on `NullQuery().pairs(model, samples)`."
    if view.batch % 2:
        raise InputError(f"A calibrated score needs pairs of a sample and its null query; got {view.batch}. {advice}")
    padding, question, target, tokens = (
        m.cpu() for m in (view.mask("padding"), view.question, view.target, view.context.tokens)
    )
    prefixes = []
    for row in range(view.batch):
        real = ~padding[row]
        n = int(question[row][real].int().argmax())
        prefixes.append((tokens[row][real][:n], target[row][real][:n], int(target[row].sum())))
    for number in range(0, view.batch, 2):
        (ids, mask, count), (null_ids, null_mask, null_count) = prefixes[number : number + 2]
        same = count == null_count == int(mask.sum()) and torch.equal(ids, null_ids) and torch.equal(mask, null_mask)
        if not same:
            raise InputError(
                f"Samples {number} and {number + 1} of the batch are no pair: up to the question they must be the same "
                f"tokens with the same target. {advice}"
            )


def _cut(values: Tensor, start: int, end: int, stop: int, width: int, fill: Any) -> Tensor:
    return torch.cat([values[:start], values.new_full((width, *values.shape[1:]), fill), values[end:stop]])


def _spliced(layout: TokenLayout, start: int, end: int, stop: int, width: int) -> TokenLayout:
    def cut(values: Tensor, fill: Any) -> Tensor:
        return _cut(values, start, end, stop, width, fill)

    return TokenLayout(
        cut(layout.kinds, int(Kind.QUESTION)),
        cut(layout.item, -1),
        cut(layout.boxes, torch.nan),
        cut(layout.frame_range, -1),
        cut(layout.view, int(View.NONE)),
        layout.items,
        layout.last_index + width - (end - start),
    )

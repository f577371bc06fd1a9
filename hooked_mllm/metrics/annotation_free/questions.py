"""Several questions on the same pictures: making such groups, and the visual attention of each question in them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.heads.counting import share_count
from hooked_mllm.inputs.resolve import ModelInputs, each_prepared
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.shared_prefix import SharedPrefix
from hooked_mllm.metrics.base import HeadMetric
from hooked_mllm.metrics.literature.null_query import NullQuery

T = TypeVar("T")


class QuestionScore(HeadMetric):
    """Base of scores on batches of several questions about the same pictures, each batch counted as one sample."""

    #: the error for a batch of another kind
    advice = ""

    def __init__(self, *, queries: str, share: float | int) -> None:
        super().__init__()
        if not 0.0 < share <= 1.0:
            raise InputError(f"share must be above 0 and at most 1 (of the visual tokens); got {share!r}.")
        self.queries = queries
        self.share = share

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """One score for the whole batch."""
        return {"total": self.score(view)}

    def profiles(self, view: AttentionView) -> Float[Tensor, "layer question head visual"]:
        """The mean attention row of each prompt's query tokens, on the visual tokens they all have.

        Raises:
            InputError: if the prompts of the batch are not the same up to their questions.
        """
        tokens, real, question = view.context.tokens, ~view.mask("padding"), view.question
        before = [tokens[row][real[row]][: int(question[row][real[row]].int().argmax())] for row in range(view.batch)]
        for row in range(1, view.batch):
            if not torch.equal(before[row], before[0]):
                raise InputError(f"Prompts 0 and {row} of the batch differ before their questions. {self.advice}")
        profile, visual = view.profile(self.queries), view.visual
        return torch.stack([profile[:, row][..., visual[row]].double() for row in range(view.batch)], dim=1)

    def focused(self, gain: Float[Tensor, "*axes visual"]) -> Float[Tensor, "*axes"]:
        """The sum of the positive entries among the `ceil(share * visual)` largest."""
        return gain.clamp(min=0).topk(share_count(self.share, gain.shape[-1]), dim=-1).values.sum(-1)


def unannotated(samples: ModelInputs) -> Iterator[Sample]:
    """The samples without their targets, so that no score can come to depend on them; those of a batch by themselves.

    Raises:
        InputError: for a mapping, or a sample that was prepared with an answer.
    """
    for sample in each_prepared(samples):
        if sample.answer is not None:
            raise InputError("These scores take prompts alone: prepare the samples without answer=.")
        yield replace(sample, target=None, target_mask=None)


def draw(others: Sequence[T], n: int, rng: np.random.Generator, question: str) -> list[T]:
    """`n` of the other questions, without repetition.

    Raises:
        InputError: if there are not that many.
    """
    if n < 1:
        raise InputError(f"n must be 1 other question at least; got {n!r}.")
    if len(others) < n:
        raise InputError(
            f"{n} other questions are to be put in the place of {question!r}, but only {len(others)} differ from it: "
            "give more `questions=`, or a smaller n."
        )
    return [others[i] for i in rng.permutation(len(others))[:n]]


def group(model: Model, sample: Sample, texts: Iterable[str]) -> SharedPrefix:
    """The sample's prompt with each of the texts as its question, as one batch whose common part is run once."""
    rows = [sample if text == sample.question else NullQuery(text).sample(model, sample) for text in texts]
    return SharedPrefix.collate(rows)


def reword(paraphrase: Callable[[str], Sequence[str]], question: str, n: int) -> list[str]:
    """`n` wordings of a question.

    Raises:
        InputError: if the function gives fewer different ones.
    """
    texts = list(dict.fromkeys(paraphrase(question)))
    if len(texts) < n:
        raise InputError(
            f"Expected {n} different wordings of {question!r}; the given function made {len(texts)}: {texts}."
        )
    return texts[:n]

"""Groups of several questions about the same pictures, and the visual attention of each question in them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.heads.counting import Seed, Share, check_seed, share_count
from hooked_mllm.inputs.resolve import ModelInputs, each_prepared
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.shared_prefix import SharedPrefix
from hooked_mllm.metrics.base import HeadMetric, check_share
from hooked_mllm.metrics.literature.null_query import NullQuery, before_questions


class QuestionScore(HeadMetric):
    """Base of scores of batches of several questions about the same pictures; a batch counts as one sample."""

    #: advice in errors about other batches
    advice = ""

    def __init__(self, *, queries: str = "question", share: Share = 0.01) -> None:
        super().__init__()
        self.queries, self.share = queries, check_share(share, " (of the visual tokens)")

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """One score for the whole batch."""
        return {"total": self.score(view)}

    def profiles(self, view: AttentionView) -> Float[Tensor, "layer question head visual"]:
        """The mean attention row of each prompt's query tokens, on the visual tokens that all have in common."""
        tokens, before = view.context.tokens, before_questions(view).to(view.context.tokens.device)
        for row in range(1, view.batch):
            if not torch.equal(tokens[row][before[row]], tokens[0][before[0]]):
                raise InputError(f"Prompts 0 and {row} of the batch differ before their questions. {self.advice}")
        profile, visual = view.profile(self.queries), view.visual
        return torch.stack([profile[:, row][..., visual[row]].double() for row in range(view.batch)], dim=1)

    def focused(self, gain: Float[Tensor, "*axes visual"]) -> Float[Tensor, "*axes"]:
        """The sum of the positive entries among the `ceil(share * visual)` largest."""
        return gain.clamp(min=0).topk(share_count(self.share, gain.shape[-1]), dim=-1).values.sum(-1)


def unannotated(samples: ModelInputs) -> Iterator[Sample]:
    """The samples, those of batches one by one, without their targets, so that no score can depend on them."""
    for sample in each_prepared(samples):
        if sample.answer is not None:
            raise InputError("These scores take prompts alone: prepare the samples without answer=.")
        yield replace(sample, target=None, target_mask=None)


def question_groups(
    model: Model,
    samples: ModelInputs,
    questions: Sequence[str] | None,
    n: int,
    seed: Seed,
    wordings: Callable[[str], Sequence[str]],
) -> Iterator[SharedPrefix]:
    """Batches of a sample's prompt under its question and `n` others, each in all its wordings."""
    if n < 1:
        raise InputError(f"n must be 1 other question at least; got {n!r}.")
    prompts = list(unannotated(samples)) if questions is None else unannotated(samples)
    if questions is None:
        questions = [prompt.question for prompt in prompts]
    # questions that share a wording have the same meaning: one of them represents all
    pool = list(dict.fromkeys(tuple(wordings(text)) for text in questions))
    rng = np.random.default_rng(check_seed(seed))
    for prompt in prompts:
        own = wordings(prompt.question)
        others = [texts for texts in pool if not set(texts) & set(own)]
        if len(others) < n:
            raise InputError(
                f"{n} other questions are to be put in the place of {prompt.question!r}, but only {len(others)} differ "
                "from it: pass more `questions=`, or a smaller n."
            )
        texts = [*own, *(text for i in rng.permutation(len(others))[:n] for text in others[i])]
        yield SharedPrefix.collate(
            [prompt if text == prompt.question else NullQuery(text).sample(model, prompt) for text in texts]
        )

"""EvidenceAgreement: whether heads attend to the evidence of the model's own answer; base of two ways to find it."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.counting import share_count
from hooked_mllm.inputs.resolve import ModelInputs
from hooked_mllm.inputs.sample import Sample, is_per_token
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.annotation_free.questions import unannotated
from hooked_mllm.metrics.base import HeadMetric


class EvidenceAgreement(ABC):
    r"""How much attention a head pays to the visual tokens from which the model takes its own answer. No target.

    $$\text{score}[l,h] = \sum_{j\in V} w[j]\, a^{l,h}[j],\qquad w[j] = \frac{r[j]}{\sum_{i\in V} r[i]}$$

    - $a[j]$: mean attention of the query tokens to visual token j; $V$: all visual tokens.
    - $r[j] \ge 0$: how much the model's greedy answer depends on j, which a subclass computes in `relevance`.

    In [0, 1], averaged over samples: `RetrievalAttentionMass` with weights in place of the annotated region. What the
    model takes its answer from need not be what it should: a wrong answer has evidence, too.

    Args:
        queries: Name of the mask of query tokens.
        n_tokens: How many tokens of the greedy answer are explained.
    """

    def __init__(self, *, queries: str = "question", n_tokens: int = 1) -> None:
        if n_tokens < 1:
            raise InputError(f"n_tokens must be 1 at least; got {n_tokens!r}.")
        self.queries = queries
        self.n_tokens = n_tokens

    @abstractmethod
    def relevance(self, model: Model, sample: Sample) -> Float[Tensor, " pos"]:
        """How much the model's answer depends on each position: not negative, on the CPU; read at visual tokens."""

    def weights(self, model: Model, sample: Sample) -> Float[Tensor, " pos"]:
        """The relevance of the visual tokens, summing to 1; zero elsewhere, or everywhere if none matters.

        Raises:
            NumericsError: if a relevance is not finite, as after an overflow in float16.
        """
        relevance = self.relevance(model, sample).double().masked_fill(~sample.mask("visual")[0].cpu(), 0)
        if not bool(torch.isfinite(relevance).all()):
            raise NumericsError(
                f"{self!r}: the relevance of {sample!r} is not finite. Load the model in bfloat16 or float32."
            )
        return relevance / relevance.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def targets(self, model: Model, samples: ModelInputs, share: float | int = 0.01) -> Iterator[Sample]:
        """The samples with the model's own evidence as their target, for any metric that needs one.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers.
            share: The target is the `ceil(share * |V|)` visual tokens of the largest weight.

        Raises:
            InputError: for a share out of range, or samples with answers.
        """
        if not 0.0 < share <= 1.0:
            raise InputError(f"share must be above 0 and at most 1 (of the visual tokens); got {share!r}.")
        for sample in unannotated(samples):
            weights, visual = self.weights(model, sample), sample.mask("visual")[0].cpu()
            best = weights.masked_fill(~visual, -1).topk(share_count(share, int(visual.sum()))).indices
            yield replace(sample, target_mask=torch.zeros_like(visual).index_fill(0, best, True))

    def run(
        self,
        model: Model,
        samples: ModelInputs,
        *,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> HeadScores:
        """Score all heads of the language model.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers; targets, if any, are dropped.
            checkpoint: A file that keeps the state when interrupted, as in `model.measure`.
            progress: Show a progress bar.

        Returns:
            `HeadScores` [layer head]. Samples in which no visual token matters are left out and counted in
            `provenance["without_evidence"]`.

        Raises:
            InputError: for samples with answers, or if no sample has evidence.
            NumericsError: when gradients or attention are not finite.
        """
        metric = _WeightedMass(self.queries, repr(self))
        skipped = 0

        def feed() -> Iterator[Sample]:
            nonlocal skipped
            for sample in unannotated(samples):
                metric.weights = self.weights(model, sample)
                if bool(metric.weights.any()):
                    yield sample
                else:
                    skipped += 1

        scores = model.measure(feed(), metric, checkpoint=checkpoint, progress=progress)
        scores.name = type(self).__name__
        scores.provenance |= {"metric": scores.name, "config": self.config(), "without_evidence": skipped}
        return scores

    def config(self) -> dict[str, Any]:
        """The settings."""
        return {
            name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"


class _WeightedMass(HeadMetric):
    """The mean row of one sample's queries, weighted; the weights are those of the sample that is being run."""

    def __init__(self, queries: str, evidence: str) -> None:
        super().__init__()
        self.queries = queries
        self.evidence = evidence
        self.weights = torch.zeros(0)

    def score(self, view: AttentionView) -> Float[Tensor, "layer 1 head"]:
        return (view.profile(self.queries) * self.weights.to(view.device)).sum(-1, dtype=torch.float64)


@torch.no_grad()
def with_greedy_answer(model: Model, sample: Sample, n_tokens: int) -> tuple[Sample, Tensor]:
    """The prompt followed by all but the last token of its greedy answer, and the answer's tokens.

    The last rows of the logits, one per token of the answer, then predict it.
    """
    if n_tokens == 1:
        return sample, model(sample, logits_to_keep=1)[0, -1].argmax()[None].cpu()
    answer = model.generate(sample, max_new_tokens=n_tokens, do_sample=False)[0, len(sample) :].cpu()
    more = answer[None, :-1]
    inputs = {
        name: torch.cat([value, _fill(name, more).to(value)], dim=1) if is_per_token(value, len(sample)) else value
        for name, value in sample.inputs.items()
    }
    return replace(sample, inputs=inputs, layout=sample.layout.padded(0, more.shape[1])), answer


def _fill(name: str, tokens: Tensor) -> Tensor:
    return tokens if name == "input_ids" else torch.full_like(tokens, int(name == "attention_mask"))


def visual_points(model: Model) -> list[str]:
    """Where visual features enter the language model: among the embeddings, and in Qwen3-VL after its first blocks."""
    return ["hook_embed", *(name for name in model.hook_dict if name.endswith(".hook_deepstack"))]

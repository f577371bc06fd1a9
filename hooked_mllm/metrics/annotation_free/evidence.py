"""EvidenceAgreement: attention to the evidence of the model's own answer; base of two ways to compute it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from hooked_mllm.attention.row_statistics import top_mask
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.counting import Share, share_count
from hooked_mllm.inputs.resolve import ModelInputs
from hooked_mllm.inputs.sample import Sample, is_per_token
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.annotation_free.questions import unannotated
from hooked_mllm.metrics.base import Configured, HeadMetric, check_share


@checked
class EvidenceAgreement(Configured, ABC):
    r"""How much attention a head pays to the visual tokens on which the model's own answer depends. No target.

    $$\text{score}[l,h] = \sum_{j\in V} w[j]\, a^{l,h}[j],\qquad w[j] = \frac{r[j]}{\sum_{i\in V} r[i]}$$

    - $a[j]$: mean attention of the query tokens to visual token j; $V$: all visual tokens.
    - $r[j] \ge 0$: how much the model's greedy answer depends on j; a subclass computes it in `relevance`.

    In [0, 1], averaged over samples: `RetrievalAttentionMass` with weights in place of the annotated region. The
    evidence of a wrong answer counts, too.

    Args:
        queries: Name of the mask of query tokens.
        n_tokens: Number of explained tokens of the greedy answer, at least 1.
    """

    def __init__(self, *, queries: str = "question", n_tokens: int = 1) -> None:
        if n_tokens < 1:
            raise InputError(f"n_tokens must be 1 at least; got {n_tokens!r}.")
        self.queries, self.n_tokens = queries, n_tokens

    @abstractmethod
    def relevance(self, model: Model, sample: Sample) -> Float[Tensor, " pos"]:
        """How much the model's answer depends on each position, at least 0, on the CPU; used at visual tokens."""

    def weights(self, model: Model, sample: Sample) -> Float[Tensor, " pos"]:
        """The relevance of the visual tokens, with sum 1; zero at others, and everywhere without evidence.

        Raises:
            NumericsError: If a relevance is not finite, as after an overflow in float16.
        """
        relevance = self.relevance(model, sample).double().masked_fill(~sample.mask("visual")[0].cpu(), 0)
        if not bool(torch.isfinite(relevance).all()):
            raise NumericsError(
                f"{self!r}: the relevance of {sample!r} is not finite. Load the model in bfloat16 or float32."
            )
        return relevance / relevance.sum().clamp(min=torch.finfo(torch.float64).tiny)

    def targets(self, model: Model, samples: ModelInputs, share: Share = 0.01) -> Iterator[Sample]:
        """The samples with the model's own evidence as their target, for any metric that needs one.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers.
            share: The target is the `ceil(share * |V|)` visual tokens of the largest weight, ties to the lower one.
        """
        check_share(share, " (of the visual tokens)")
        for sample in unannotated(samples):
            weights, visual = self.weights(model, sample), sample.mask("visual")[0].cpu()
            best = top_mask(weights.masked_fill(~visual, -1), share_count(share, int(visual.sum())))
            yield replace(sample, target_mask=best)

    def run(
        self, model: Model, samples: ModelInputs, *, checkpoint: str | Path | None = None, progress: bool = True
    ) -> HeadScores:
        """Score all heads of the language model.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers; targets are not used. Samples without evidence are excluded and
                counted in `provenance["without_evidence"]`; one with evidence is needed.
            checkpoint: A file for the state, as in `model.measure`.
            progress: Show a progress bar.
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


class _WeightedMass(HeadMetric):
    """The weighted mean row of the queries, with the weights of the current sample."""

    def __init__(self, queries: str, evidence: str) -> None:
        super().__init__()
        self.queries, self.evidence, self.weights = queries, evidence, torch.zeros(0)

    def score(self, view: AttentionView) -> Float[Tensor, "layer 1 head"]:
        return (view.profile(self.queries) * self.weights.to(view.device)).sum(-1, dtype=torch.float64)


@torch.no_grad()
def with_greedy_answer(model: Model, sample: Sample, n_tokens: int) -> tuple[Sample, Tensor]:
    """The prompt with all but the last token of its greedy answer, and the answer, which its last logits predict."""
    if n_tokens == 1:
        return sample, model(sample, logits_to_keep=1)[0, -1].argmax()[None].cpu()
    answer = model.generate(sample, max_new_tokens=n_tokens, do_sample=False)[0, len(sample) :].cpu()
    inputs = {
        name: pad(value, (0, len(answer) - 1), value=int(name == "attention_mask"))
        if is_per_token(value, len(sample))
        else value
        for name, value in sample.inputs.items()
    }
    inputs["input_ids"][0, len(sample) :] = answer[:-1]
    return replace(sample, inputs=inputs, layout=sample.layout.padded(0, len(answer) - 1)), answer


def visual_points(model: Model) -> list[str]:
    """Hook points of visual features entering the language model: the embeddings, and DeepStack's in Qwen3-VL."""
    return ["hook_embed", *(name for name in model.hook_dict if name.endswith(".hook_deepstack"))]

"""OcclusionAgreement: evidence by the answer's loss of probability without visual tokens."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.metrics.annotation_free.evidence import EvidenceAgreement, visual_points, with_greedy_answer


@checked
class OcclusionAgreement(EvidenceAgreement):
    r"""Attention to the visual tokens without which the model's own answer is less likely. No target.

    $$\text{score}[l,h] = \sum_{j\in V} \frac{r[j]}{\sum_i r[i]}\, a^{l,h}[j],\qquad
    r[j] = \max\big(\log p(y) - \log p(y \mid j \text{ occluded}),\ 0\big)$$

    - $a[j]$: mean attention of the query tokens to visual token j; $V$: all visual tokens.
    - $y$: the greedy answer. An occluded token has the mean features of all visual tokens of its sample, at every hook
      point where visual features enter the language model.

    In [0, 1], averaged over samples. Whole windows of tokens are occluded, then each token of the windows with the
    largest effect; other tokens have no weight. That is about `(1 + refine) * sqrt(|V|)` forward passes a sample, with
    the vision tower. Evidence that is in the image twice is missed: without either, the other determines the answer.

    Args:
        window: Number of visual tokens in a window, in their order; by default the square root of all, rounded up.
        refine: Number of windows whose tokens are occluded one by one.
        batch_size: Number of occluded copies of a sample that run together.
        queries: Name of the mask of query tokens.
        n_tokens: Number of explained tokens of the greedy answer. All numbers are at least 1.

    Source: occlusion, arXiv:1311.2901, as the region of arXiv:2606.05843 eq. 1.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> weights = metrics.OcclusionAgreement().weights(model, sample)
        >>> int(weights.argmax()) == int(sample.mask("target")[0].int().argmax())
        True
    """

    def __init__(
        self,
        *,
        window: int | None = None,
        refine: int = 2,
        batch_size: int = 8,
        queries: str = "question",
        n_tokens: int = 1,
    ) -> None:
        super().__init__(queries=queries, n_tokens=n_tokens)
        for name, value in (("window", window), ("refine", refine), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 at least; got {value!r}.")
        self.window, self.refine, self.batch_size = window, refine, batch_size

    def relevance(self, model: Model, sample: Sample) -> Float[Tensor, " pos"]:
        """The answer's loss of log-probability by occluding each position; 0 where it was not occluded alone."""
        forced, answer = with_greedy_answer(model, sample, self.n_tokens)
        visual = sample.mask("visual")[0].cpu().nonzero()[:, 0]
        windows = visual.split(self.window or math.ceil(math.sqrt(len(visual))))
        drops = self._drops(model, forced, answer, windows, visual)  # [window]
        best = drops.topk(min(self.refine, len(windows)))
        tokens = [windows[i] for i, drop in zip(best.indices.tolist(), best.values.tolist(), strict=True) if drop > 0]
        relevance = torch.zeros(len(sample), dtype=torch.float64)
        if tokens:
            alone = torch.cat(tokens)
            relevance[alone] = self._drops(model, forced, answer, alone.split(1), visual).clamp(min=0)
        return relevance

    @torch.no_grad()
    def _drops(
        self, model: Model, sample: Sample, answer: Tensor, occluded: Sequence[Tensor], visual: Int[Tensor, " visual"]
    ) -> Float[Tensor, " set"]:
        """The answer's loss of log-probability by each set of occluded positions."""

        def log_prob(occluded: Sequence[Tensor]) -> Float[Tensor, " set"]:
            def occlude(value: Tensor, hook: HookPoint) -> Tensor:
                value = value.clone()
                mean = value[:, visual].mean(1)
                for row, positions in enumerate(occluded):
                    value[row, positions] = mean[row]
                return value

            batch = SampleBatch.collate([sample] * len(occluded))
            with model.hooks([(name, occlude) for name in visual_points(model)]):
                logits = model(batch, logits_to_keep=len(answer))  # [set token vocab]
            index = answer.to(logits.device)[None, :, None].expand(len(occluded), -1, 1)
            return logits.double().log_softmax(-1).gather(2, index)[..., 0].sum(1).cpu()

        size = self.batch_size
        batches = [log_prob(occluded[i : i + size]) for i in range(0, len(occluded), size)]
        return log_prob([visual[:0]]) - torch.cat(batches)

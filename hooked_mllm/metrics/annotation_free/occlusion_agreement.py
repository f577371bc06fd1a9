"""OcclusionAgreement: the evidence is what the answer cannot do without."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.metrics.annotation_free.evidence import EvidenceAgreement, visual_points, with_greedy_answer


class OcclusionAgreement(EvidenceAgreement):
    r"""Attention to the visual tokens without which the model's own answer gets less likely. No target.

    $$\text{score}[l,h] = \sum_{j\in V} \frac{r[j]}{\sum_i r[i]}\, a^{l,h}[j],\qquad
    r[j] = \max\big(\log p(y) - \log p(y \mid j \text{ occluded}),\ 0\big)$$

    - $a[j]$: mean attention of the query tokens to visual token j; $V$: all visual tokens.
    - $y$: the greedy answer. An occluded token has the mean features of all visual tokens of its sample, at every place
      where visual features enter the language model.

    In [0, 1], averaged over samples. From coarse to fine: first whole windows of tokens are occluded, then each token
    of the windows that mattered most; all other tokens have no weight. That is about `(1 + refine) * sqrt(|V|)`
    forward passes a sample, vision tower included. Evidence that is in the image twice is missed: without either, the
    other still gives the answer.

    Args:
        window: Visual tokens of a window, in their order; by default the square root of their number, rounded up.
        refine: How many windows are looked at token by token.
        batch_size: How many occluded copies of a sample run together.
        queries: Name of the mask of query tokens.
        n_tokens: How many tokens of the greedy answer are explained.

    Raises:
        InputError: for a number below 1.

    Source: occlusion, arXiv:1311.2901, as the region of arXiv:2606.05843 eq. 1.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics
        >>> from hooked_mllm.toys import VisualRetrieval
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> sample = VisualRetrieval(pages=1).samples(model, 1)[0]
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
        self.window = window
        self.refine = refine
        self.batch_size = batch_size

    def relevance(self, model: Model, sample: Sample) -> Float[Tensor, " pos"]:
        """By how much occluding each position lowers the answer's log-probability; 0 where it was not tried alone."""
        forced, answer = with_greedy_answer(model, sample, self.n_tokens)
        visual = sample.mask("visual")[0].cpu().nonzero()[:, 0]
        windows = visual.split(self.window or math.ceil(math.sqrt(len(visual))))
        drops = self._drops(model, forced, answer, windows, visual)
        best = drops.topk(min(self.refine, len(windows)))
        tokens = [windows[i] for i, drop in zip(best.indices.tolist(), best.values.tolist(), strict=True) if drop > 0]
        relevance = torch.zeros(len(sample), dtype=torch.float64)
        if tokens:
            alone = torch.cat(tokens)
            relevance[alone] = self._drops(model, forced, answer, alone.split(1), visual).clamp(min=0)
        return relevance

    @torch.no_grad()
    def _drops(
        self,
        model: Model,
        sample: Sample,
        answer: Int[Tensor, " token"],
        places: Sequence[Int[Tensor, " _"]],
        visual: Int[Tensor, " visual"],
    ) -> Float[Tensor, " place"]:
        """What the answer's log-probability loses by each set of positions that is occluded."""
        none = visual[:0]
        likely = [
            self._log_prob(model, sample, answer, places[i : i + self.batch_size], visual)
            for i in range(0, len(places), self.batch_size)
        ]
        return self._log_prob(model, sample, answer, [none], visual) - torch.cat(likely)

    def _log_prob(
        self, model: Model, sample: Sample, answer: Tensor, places: Sequence[Tensor], visual: Tensor
    ) -> Float[Tensor, " place"]:
        def occlude(value: Tensor, hook: HookPoint) -> Tensor:
            value = value.clone()
            mean = value[:, visual].mean(1)
            for row, at in enumerate(places):
                value[row, at] = mean[row]
            return value

        batch = SampleBatch.collate([sample] * len(places))
        with model.hooks([(name, occlude) for name in visual_points(model)]):
            logits = model(batch, logits_to_keep=len(answer))
        log_prob = logits.double().log_softmax(-1)
        wanted = answer.to(logits.device)[None, :, None].expand(len(places), -1, 1)
        return log_prob.gather(2, wanted)[..., 0].sum(1).cpu()

"""Scores calibrated by a null query: minus the attention of the head on the same tokens under it."""

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.base import HeadMetric
from hooked_mllm.metrics.literature.null_query import check_pairs


class CalibratedScore(HeadMetric):
    """Base of scores of pairs of a sample and its null query, from `NullQuery().pairs(model, samples)`."""

    def __init__(self, *, queries: str = "question") -> None:
        super().__init__()
        self.queries = queries
        self.add_sum("chance")

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """The score of each pair, and that of even attention."""
        if view.layers[0] == 0:
            check_pairs(view)
        chance = view.chance(self.queries, "target")
        return {"total": self.score(view), "chance": chance[:, 0::2] - chance[:, 1::2]}


@checked
class MMRetHeads(CalibratedScore):
    r"""Multimodal retrieval heads (MMRetHeads): attention to the evidence, less that under a null query.

    $$\text{MMRet}[l,h] = S^{l,h}(x) - S^{l,h}(x_\emptyset),\qquad
    S^{l,h}(x) = \frac{1}{|Q|}\sum_{i\in Q}\sum_{j\in K^*} A^{l,h}[i,j]$$

    - $x_\emptyset$: the same prompt with "N/A" as its question; $K^*$: the visual tokens of the evidence.

    In [-1, 1], averaged over samples, and measured on `NullQuery().pairs(model, samples)`. The paper selects the top
    5 % (`compute().top(0.05)`) and reports `compute().rho_half()`. `provenance["chance"]`: score of even attention.

    Args:
        queries: Q, name of a mask of tokens.

    Source: arXiv:2605.27243.

    Examples:
        >>> from hooked_mllm.metrics import MMRetHeads
        >>> MMRetHeads()
        MMRetHeads(queries='question')
    """

    def score(self, view: AttentionView) -> Float[Tensor, "layer pair head"]:
        """The difference of the masses of each pair."""
        mass = view.mass(self.queries, "target")
        return mass[:, 0::2] - mass[:, 1::2]


@checked
class QRHead(CalibratedScore):
    r"""Query-focused retrieval heads (QRHead), calibrated token by token.

    $$c^{l,h}[j] = a^{l,h}[j] - a_\emptyset^{l,h}[j],\qquad
    \text{QR}[l,h] = \sum_{j\in K^*} c^{l,h}[j]\,\big[c^{l,h}[j] > \mu^{l,h} - z\,\sigma^{l,h}\big]$$

    - $a[j]$: the mean attention of the question's tokens to key j; $a_\emptyset$: the same under the null query.
    - $\mu, \sigma$: mean and (unbiased) standard deviation of $c$ over the tokens of the evidence $K^*$, for each
      head: tokens far below the others are excluded. A single token is included.

    Averaged over samples, and measured on `NullQuery().pairs(model, samples)`. `provenance["chance"]` is the score of
    even attention with all tokens. Without calibration the score is `RetrievalAttentionMass`.

    The released code differs: its query span includes the late instruction, "Query:" and the assistant's header
    (`queries="text"` is the nearest); the softmax is in float16; the published list for NQ ranks heads by NDCG@10 of
    the documents' order, not by this score; samples without gold documents count as 0. Here the evidence is the
    sample's target, one document.

    Args:
        queries: Name of the mask of query tokens.
        outlier: z, above 0.

    Source: arXiv:2506.09944.

    Examples:
        >>> from hooked_mllm.metrics import QRHead
        >>> QRHead()
        QRHead(queries='question', outlier=2.0)
    """

    def __init__(self, *, queries: str = "question", outlier: float = 2.0) -> None:
        super().__init__(queries=queries)
        if not outlier > 0:
            raise InputError(f"outlier must be above 0 (standard deviations below the mean); got {outlier!r}.")
        self.outlier = outlier

    def score(self, view: AttentionView) -> Float[Tensor, "layer pair head"]:
        """The calibrated mass of each pair without outliers."""
        profile, target = view.profile(self.queries), view.target
        scores = []
        for pair in range(0, view.batch, 2):
            real, null = (profile[:, row][..., target[row]].double() for row in (pair, pair + 1))
            change = real - null  # [layer head target]
            kept = torch.ones_like(change, dtype=torch.bool)
            if change.shape[-1] > 1:
                spread = change.std(-1, keepdim=True)
                # changes that are equal up to rounding have no outliers
                rounding = 1e-5 * torch.maximum(real, null).amax(-1, keepdim=True)
                kept = change >= change.mean(-1, keepdim=True) - self.outlier * spread - rounding
            scores.append((change * kept).sum(-1))
        return torch.stack(scores, dim=1)

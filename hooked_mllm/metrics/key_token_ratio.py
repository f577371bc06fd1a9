"""KeyTokenRatio: the share of the target among the tokens that a head attends to most."""

from numbers import Real

import torch
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.counting import Share
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.attention_score import AttentionScore


@checked
class KeyTokenRatio(AttentionScore):
    r"""Key Token Ratio (KTR): the share of the target tokens that a head holds among its most attended ones.

    $$a^{l,h}[j] = \frac{1}{|Q|}\sum_{i\in Q} A^{l,h}[i,j],\qquad
    \mathrm{KTR}[l,h] = \frac{|S^{l,h}\cap K^*|}{|K^*|}$$

    - $S^{l,h}$: the `ceil(share * N)` positions with the largest $a^{l,h}$ among the N positions of the sequence
      (without padding); ties to the lower index.
    - $K^*$: the visual tokens of the target region; every sample needs one.

    In [0, 1], averaged over samples; `compute().mean(heads)` is the mean KTR of a head group, `hit_rate()` the share of
    samples with KTR >= `hit`.

    Args:
        share: Share of the sequence that counts as most attended, above 0 and at most 1.
        hit: KTR from which a sample counts as a hit, above 0 and at most 1.
        queries: Q, name of a mask of tokens.

    Source: arXiv:2606.05843 eq. 22 and 23.

    Examples:
        >>> from hooked_mllm.metrics import KeyTokenRatio
        >>> KeyTokenRatio(share=0.1)
        KeyTokenRatio(share=0.1, hit=0.5, queries='question')
    """

    hits: Tensor

    def __init__(self, *, share: Share = 0.05, hit: Share = 0.5, queries: str = "question") -> None:
        super().__init__(queries=queries, keys="target", reduce="topk", share=share)
        if isinstance(hit, bool) or not isinstance(hit, Real) or not 0.0 < hit <= 1.0:
            raise InputError(f"hit must be above 0 and at most 1; got {hit!r}.")
        self.hit = float(hit)
        self.add_sum("hits", dtype=torch.int64)

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """The ratios of this view and whether they are hits."""
        parts = super().observe(view)
        # a share of tokens reaches the threshold that it was computed or rounded to
        return {**parts, "hits": parts["total"] >= self.hit - 1e-7}

    def hit_rate(self) -> HeadScores:
        """The share of samples whose KTR reaches `hit`, [layer head], over all processes."""
        with self.synced():
            return self.scores("hits", name=f"{type(self).__name__}.hit_rate")

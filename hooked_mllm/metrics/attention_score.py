"""AttentionScore: the common formula of the attention scores of the literature."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.attention.row_statistics import first_largest, top_mask
from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.counting import Count, Share, resolve_count
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions, is_token_kind
from hooked_mllm.layout import Region
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.query_selection import TokenMask
from hooked_mllm.metrics.base import HeadMetric, Piece, check_share

if TYPE_CHECKING:
    Reduction = Literal["sum", "argmax", "topk"]
    OverSamples = Literal["mean", "frequency"]
else:  # at run time wider, so that another value reaches the check whose error lists the choices
    Reduction = OverSamples = str

REDUCTIONS: tuple[Reduction, ...] = ("sum", "argmax", "topk")
OVER_SAMPLES: tuple[OverSamples, ...] = ("mean", "frequency")
#: scores of one sample in float32 that differ by less, relative to their size, may be equal in exact arithmetic
ROUNDING = 1e-4


@checked
class AttentionScore(HeadMetric):
    r"""How much attention each head's query tokens pay to the key tokens.

    $$\text{score}[l,h] = \Omega_s\Big[\frac{1}{|Q_s|}\sum_{i\in Q_s}\Phi_{j\in K_s}\big(A^{l,h}[i,j]\big)\Big]$$

    - $A^{l,h}[i,j]$: attention after the softmax, of head h in layer l, from query position i to key position j.
    - $Q_s, K_s$: query and key tokens of sample s.

    Retrieval attention mass, vision heads, visual retrieval heads, gaze heads and OCR heads are settings of it. With
    "sum", `provenance["chance"]` is the mass of even attention by layer, since the mass on K grows with the size of K;
    where some heads stream it is the mean over the layer's heads, and `provenance["chance_by_head"]` has each. With
    "frequency", it is the share of samples that would select a head drawn at random: `select` over all heads.

    Args:
        queries: Q, a token kind ("question", "answer", "last", ...), a region, a mask, indices or an index; every
            sample needs such tokens.
        keys: K, likewise: "target", "visual", `Box(0, 0, 9, 9)`, ...
        reduce: $\Phi$: "sum" adds the attention over K; "argmax" is 1 if the row's largest entry is in K, else 0;
            "topk" is the share of K among the `ceil(share * N)` largest entries of the mean row over Q.
        over_samples: $\Omega$: "mean", or "frequency", the share of samples with the head among their best `select`;
            scores that differ by rounding (relative 1e-4) are ties, which go to the lower layer, then head.
        share: For "topk", above 0 and at most 1.
        select: For "frequency": number of heads (int), or share of all heads (float).

    Source: arXiv:2608.27417 (the common formula); arXiv:2606.05843 eq. 1, 22, 23.

    Examples:
        >>> from hooked_mllm.metrics import AttentionScore
        >>> AttentionScore(queries="last", keys="target", reduce="argmax").config()["reduce"]
        'argmax'
    """

    def __init__(
        self,
        *,
        queries: Positions = "question",
        keys: Positions = "target",
        reduce: Reduction = "sum",
        over_samples: OverSamples = "mean",
        share: Share = 0.05,
        select: Count = 0.05,
    ) -> None:
        super().__init__()
        choices = (("reduce", reduce, REDUCTIONS), ("over_samples", over_samples, OVER_SAMPLES))
        for name, value, known in choices:
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        whole = isinstance(select, Integral)
        wrong = isinstance(select, bool) or not isinstance(select, Real)
        if wrong or not (select >= 1 if whole else 0.0 < select <= 1.0):
            raise InputError(f"select must be a positive number of heads or a share of them up to 1.0; got {select!r}.")
        self.queries, self.keys = _tokens(queries), _tokens(keys)
        self.reduce: Reduction = reduce
        self.over_samples: OverSamples = over_samples
        self.share, self.select = check_share(share), int(select) if whole else float(select)
        if reduce == "sum":
            self.add_sum("chance")

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        settings = super().config()
        return settings | {n: _described(getattr(self, n)) for n in ("queries", "keys") if n in settings}

    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """The formula for each sample, before the reduction over samples."""
        if self.reduce == "sum":
            return view.mass(self.queries, self.keys)
        if self.reduce == "topk":
            return view.top_share(self.queries, self.keys, self.share)
        keys = view.mask(self.keys)

        def inside(rows: Tensor) -> Tensor:
            best = first_largest(rows)
            return torch.take_along_dim(keys[None, :, None].expand(*rows.shape[:3], -1), best, dim=-1).float()

        return view.average(view.rows(self.queries, reduce=inside), self.queries)

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """The scores of this view, and with "sum" those of even attention."""
        parts = super().observe(view)
        if self.reduce == "sum":
            parts["chance"] = view.chance(self.queries, self.keys)
        return parts

    def compute(self) -> HeadScores:
        """The reduction over samples, [layer head], with the score that chance gives in the provenance."""
        if self.over_samples == "mean":
            return super().compute()
        scores = self.scores("total")
        heads = int(scores.measured.sum())
        chance = resolve_count(self.select, heads) / heads
        missing = set(scores.missing)
        scores.provenance["chance"] = [None if layer in missing else chance for layer in range(scores.n_layers)]
        return scores

    def commit(self, pieces: Sequence[Piece]) -> None:
        """Add a finished sample: its scores, or 1 for each head that it selects."""
        super().commit(pieces if self.over_samples == "mean" else self._elect(pieces))

    def _elect(self, pieces: Sequence[Piece]) -> list[Piece]:
        # [layer batch head] of all measured layers -> one ranking per sample
        scores = torch.cat([piece.parts["total"] for piece in pieces])
        layers, batch, heads = scores.shape
        k = resolve_count(self.select, layers * heads)
        flat = scores.transpose(0, 1).reshape(batch, layers * heads)
        elected = top_mask(flat, k, rounding=ROUNDING).view(batch, layers, heads).transpose(0, 1)
        # a NaN passes, so that compute() names its head
        votes = torch.where(scores.isnan(), scores, elected.to(scores.dtype)).split([len(p.layers) for p in pieces])
        return [replace(p, parts={**p.parts, "total": vote}) for p, vote in zip(pieces, votes, strict=True)]


def _tokens(selected: Positions) -> TokenMask:
    """Positions as a key of a view's tables: a name, a region or regions, or a tensor, compared by identity."""
    check_positions(selected)
    if isinstance(selected, slice):
        raise InputError(f"AttentionScore takes no slice, as samples differ in length: give indices; got {selected}.")
    if not is_token_kind(selected):
        return torch.as_tensor(selected)
    return cast(TokenMask, selected if isinstance(selected, str | Region) else tuple(selected))


def _described(tokens: TokenMask) -> Any:
    """Tokens as values that JSON can hold, with every position of a mask."""
    if isinstance(tokens, Tensor) and tokens.dtype == torch.bool:
        return {"mask": tokens.nonzero().tolist(), "shape": [*tokens.shape]}
    return describe_positions(tokens)

"""AttentionScore: the one formula behind the attention scores of the literature, with its switches."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.attention.row_statistics import top_mask
from hooked_mllm.errors import InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.counting import resolve_count
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.base import HeadMetric, Piece, even_attention

REDUCTIONS = ("sum", "argmax", "topk")
OVER_SAMPLES = ("mean", "frequency")


class AttentionScore(HeadMetric):
    r"""How much, or how exclusively, each head's query tokens look at the key tokens.

    $$\text{score}[l,h] = \Omega_s\Big[\frac{1}{|Q_s|}\sum_{i\in Q_s}\Phi_{j\in K_s}\big(A^{l,h}[i,j]\big)\Big]$$

    - $A^{l,h}[i,j]$: attention after the softmax, of head h in layer l, from query position i to key position j.
    - $Q_s$, `queries`: "question", "answer", "last" or any other mask of the sample s.
    - $K_s$, `keys`: "target", "visual" or any other mask.
    - $\Phi$, `reduce`: "sum" adds the attention over K; "argmax" is 1 if the row's largest entry lies in K, else 0;
      "topk" is the share of K among the `ceil(share * N)` largest entries of the mean row over Q.
    - $\Omega$, `over_samples`: "mean", or "frequency": the share of samples with the head among their best `select`.

    Retrieval attention mass (question, target, sum, mean), vision heads (question, visual, sum, mean), visual retrieval
    heads (answer, target, sum, mean), gaze heads (last, target, sum, mean) and retrieval-head scores with an argmax are
    settings of it. With "sum", the result also has the chance level, `provenance["chance"]`, per layer: the mass
    of a head that attends evenly to all it sees, since the mass on K grows with the size of K. Where some heads stream
    that is the mean over the layer's heads, and `provenance["chance_by_head"]` has each.

    Args:
        queries: Name of the mask of query tokens.
        keys: Name of the mask of key tokens.
        reduce: Over the keys: "sum", "argmax" or "topk".
        over_samples: "mean" or "frequency".
        share: With "topk": the share of the sequence that counts as its top, above 0 and at most 1.
        select: With "frequency": how many heads (int), or which share of all heads (float), each sample elects.

    Raises:
        InputError: for an unknown reduction or a number out of range; on `update`, if a sample lacks the tokens.

    Source: arXiv:2608.27417 (the common formula); arXiv:2606.05843 eq. 1, 22, 23.

    Examples:
        >>> from hooked_mllm.metrics import AttentionScore
        >>> AttentionScore(queries="last", keys="target", reduce="argmax").config()["reduce"]
        'argmax'
    """

    chance: Tensor

    def __init__(
        self,
        *,
        queries: str = "question",
        keys: str = "target",
        reduce: str = "sum",
        over_samples: str = "mean",
        share: float = 0.05,
        select: int | float = 0.05,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("reduce", reduce, REDUCTIONS),
            ("over_samples", over_samples, OVER_SAMPLES),
        ):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}; got {value!r}.")
        if not 0.0 < share <= 1.0:
            raise InputError(f"share must be above 0 and at most 1; got {share!r}.")
        if select <= 0 or (isinstance(select, float) and select > 1.0):
            raise InputError(f"select must be a positive number of heads or a share of them up to 1.0; got {select!r}.")
        self.queries = queries
        self.keys = keys
        self.reduce = reduce
        self.over_samples = over_samples
        self.share = share
        self.select = select
        if reduce == "sum":
            self.add_sum("chance")

    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """The formula for each sample, before the reduction over samples."""
        if self.reduce == "sum":
            return view.mass(self.queries, self.keys)
        if self.reduce == "topk":
            return view.top_share(self.queries, self.keys, self.share)
        keys = view.mask(self.keys)

        def inside(rows: Tensor) -> Tensor:
            best = rows.argmax(-1)  # the first of equal entries
            return torch.take_along_dim(keys[None, :, None].expand(*rows.shape[:3], -1), best, dim=-1).float()

        return view.average(view.rows(self.queries, reduce=inside), self.queries)

    def compute(self) -> HeadScores:
        """The score of every head over all samples; with "sum" and "mean", the chance level is in its provenance.

        Raises:
            InputError: if no sample was taken in.
            NumericsError: if a score was NaN or infinite, naming the heads.
        """
        if self.reduce != "sum":
            return self.scores("total")
        return self.scores("total", **even_attention(self.chance, self.count))

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """The scores of this view, and for a mass its chance level."""
        parts = super().observe(view)
        if self.reduce == "sum":
            parts["chance"] = view.chance(self.queries, self.keys)
        return parts

    def commit(self, pieces: Sequence[Piece]) -> None:
        """Add a finished sample: its scores, or the heads that it elects."""
        super().commit(pieces if self.over_samples == "mean" else self._elect(pieces))

    def _elect(self, pieces: Sequence[Piece]) -> list[Piece]:
        # [layer batch head] of all measured layers -> one ranking per sample
        scores = torch.cat([piece.parts["total"] for piece in pieces])
        layers, batch, heads = scores.shape
        k = resolve_count(self.select, layers * heads)
        flat = scores.transpose(0, 1).reshape(batch, layers * heads)
        elected = top_mask(flat, k).view(batch, layers, heads).transpose(0, 1)
        # a NaN elects nobody silently; let it through to be named
        votes = torch.where(scores.isnan(), scores, elected.to(scores.dtype)).split([len(p.layers) for p in pieces])
        return [replace(p, parts={**p.parts, "total": vote}) for p, vote in zip(pieces, votes, strict=True)]

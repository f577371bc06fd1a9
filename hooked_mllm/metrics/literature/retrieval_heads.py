"""Scores by the copy rule: the most attended key while a token is generated."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.attention.row_statistics import first_largest
from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.base import HeadMetric


def hits(
    view: AttentionView, keys: Bool[Tensor, "batch pos"]
) -> tuple[Int[Tensor, "layer batch head query"], Bool[Tensor, "layer batch head query"]]:
    """The most attended position of each generating row, the first of equal ones, and whether it is a key."""
    best = view.rows("generating", reduce=lambda rows: first_largest(rows).to(rows.dtype)).long()
    _, valid = view.positions("generating")  # False in rows that only fill up the batch
    inside = torch.take_along_dim(keys[None, :, None].expand(*best.shape[:3], -1), best, dim=-1)
    return best, inside & valid[:, None]


@checked
class RetrievalHeads(HeadMetric):
    r"""Retrieval heads: the share of a text in the prompt that a head copies, token by token, into the answer.

    $$\text{Retrieval}[l,h] = \frac{|g^{l,h}|}{|K|},\qquad
    g^{l,h} = \big\{j \in K : \exists\, i \in G,\ j = \arg\max_{j'} A^{l,h}[i,j'] \text{ and } x_j = x_{i+1}\big\}$$

    - $G$: the positions whose output is the answer's tokens $x_{i+1}$; $K$: the tokens of the needle, a text.
    - A token is copied if the head attends most to it while the same token is generated.

    In [0, 1], averaged over samples. Of equal entries the first is the largest. The answer is from
    `prepare(answer=...)`.

    The released code differs: each hit adds 1/|K|, so that copying a token twice counts twice and the score can exceed
    1 (`released_code=True`). It also decodes greedily, at most 50 tokens, finds the needle by the overlap of token
    sets in any order, and averages only runs that repeat the needle (ROUGE-1 recall above 0.5).

    Args:
        keys: K, name of a mask of text tokens, such as "question" or "system"; for text in images see `OCRHeads`.
        released_code: Count repeated copies.

    Source: arXiv:2404.15574.

    Examples:
        >>> from hooked_mllm.metrics import RetrievalHeads
        >>> RetrievalHeads()
        RetrievalHeads(keys='question', released_code=False)
    """

    def __init__(self, *, keys: str = "question", released_code: bool = False) -> None:
        super().__init__()
        if keys in ("target", "visual", "pixels"):
            raise InputError(
                f"Retrieval heads copy text; {keys!r} tokens are placeholders that no answer repeats. Use OCRHeads()."
            )
        self.keys = keys
        self.released_code = released_code

    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """The copied share of the needle."""
        keys, tokens = view.mask(self.keys), view.context.tokens
        best, hit = hits(view, keys)
        index, _ = view.positions("generating")
        generated = tokens.gather(1, index + 1)  # [batch query]; a generating position is never the last
        attended = torch.take_along_dim(tokens[None, :, None].expand(*best.shape[:3], -1), best, dim=-1)
        copied = hit & (attended == generated[:, None])
        size = keys.sum(-1)[:, None].double()
        if self.released_code:
            return copied.sum(-1) / size
        copies = torch.zeros(*best.shape[:3], view.n_keys, dtype=torch.int32, device=best.device)
        copies.scatter_add_(-1, best, copied.int())  # [layer batch head key]
        return (copies > 0).sum(-1) / size


@checked
class SparseMMHeads(HeadMetric):
    r"""SparseMM's visual-head score: attending most to the box of a written text while it is generated.

    $$\text{SparseMM}[l,h] = \frac{1}{|K^*|}\sum_{i\in G}\big[\arg\max_j A^{l,h}[i,j]\in K^*\big]$$

    - $G$: the positions whose output is the answer's tokens; $K^*$: the visual tokens of the text's box.

    Averaged over samples. One sample is one piece of text: its answer is the text and its target the box; the paper's
    score of a document is the sum over its pieces. Not bounded by 1: it grows with the answer's length over the box's
    size, which favours small boxes.

    The released code differs: it transcribes the whole document and counts a generated token only if it is a substring
    of exactly one piece; it measures the box on a grid of whole cells, the last one included (here: every token that
    overlaps it); called twice on one grid tensor, it halves it again.

    Source: arXiv:2506.05344.

    Examples:
        >>> from hooked_mllm.metrics import SparseMMHeads
        >>> SparseMMHeads()
        SparseMMHeads()
    """

    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """Hits over the size of the box."""
        keys = view.mask("target")
        return hits(view, keys)[1].sum(-1) / keys.sum(-1)[:, None].double()

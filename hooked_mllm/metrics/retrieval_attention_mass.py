"""RetrievalAttentionMass: the attention that the question pays to the target region."""

from hooked_mllm.checks import checked
from hooked_mllm.metrics.attention_score import AttentionScore


@checked
class RetrievalAttentionMass(AttentionScore):
    r"""Retrieval Attention Mass (RAM): the attention that the question's tokens pay to the target visual tokens.

    $$\mathrm{RAM}[l,h] = \frac{1}{|Q|}\sum_{i\in Q}\sum_{j\in K^*} A^{l,h}[i,j]$$

    - $A^{l,h}[i,j]$: attention after the softmax, of head h in layer l, from position i to position j.
    - $Q$: the tokens of the user's question, without system prompt, template and answer (the paper leaves this open).
    - $K^*$: the visual tokens of the target region; every sample needs one.

    In [0, 1], averaged over samples; the heads that score highest are the paper's CoRe heads (`compute().top(0.05)`).
    The mass grows with the size of the region: `compute().provenance["chance"]` holds the score of even attention.

    Args:
        queries: Q, name of a mask of tokens: "question", "last", "text", "answer", ...

    Source: arXiv:2606.05843 eq. 1.

    Examples:
        >>> from hooked_mllm.metrics import RetrievalAttentionMass
        >>> RetrievalAttentionMass(queries="last")
        RetrievalAttentionMass(queries='last')
    """

    def __init__(self, *, queries: str = "question") -> None:
        super().__init__(queries=queries, keys="target", reduce="sum")

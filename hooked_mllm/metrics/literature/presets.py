"""Scores of the literature that are settings of `AttentionScore`: `provenance["chance"]` is that of even attention."""

from hooked_mllm.checks import checked
from hooked_mllm.metrics.attention_score import AttentionScore


@checked
class VisualRetrievalHeads(AttentionScore):
    r"""Visual retrieval heads (VRH): the attention that the answer's tokens pay to the target region.

    $$\text{VRH}[l,h] = \frac{1}{|Y|}\sum_{i\in Y}\sum_{j\in K^*} A^{l,h}[i,j]$$

    - $Y$: the answer's tokens, from `prepare(answer=...)`; $K^*$: the visual tokens that overlap the target region.

    In [0, 1], averaged over samples. The paper decodes greedily; here the answer is an input, with the same result
    where the model would generate it. The paper's "masking" sets a head's z to zero and cites Wu et al., whose released
    code averages the values instead.

    Args:
        queries: Y, name of a mask of tokens; "generating": the positions whose output they are, one earlier.

    Source: arXiv:2608.27417.

    Examples:
        >>> from hooked_mllm.metrics import VisualRetrievalHeads
        >>> VisualRetrievalHeads()
        VisualRetrievalHeads(queries='answer')
    """

    def __init__(self, *, queries: str = "answer") -> None:
        super().__init__(queries=queries, keys="target", reduce="sum")


@checked
class GazeHeads(AttentionScore):
    r"""Gaze heads: the attention of the prompt's last token on the target region.

    $$\text{Gaze}[l,h] = \sum_{j\in K^*} A^{l,h}[n,j]$$

    - $n$: the last position of the prompt; $K^*$: the visual tokens of the target region.

    In [0, 1], averaged over samples, one for each target region. The mass is not divided by that on all regions: a
    head that ignores the image could have perfect ratios. The paper draws random controls among heads of low score;
    `HeadScores.random(like=...)` draws them in the same layers among all others.

    Args:
        queries: Name of the mask of query tokens.

    Source: arXiv:2606.14703.

    Examples:
        >>> from hooked_mllm.metrics import GazeHeads
        >>> GazeHeads().config()
        {'queries': 'last'}
    """

    def __init__(self, *, queries: str = "last") -> None:
        super().__init__(queries=queries, keys="target", reduce="sum")


@checked
class OCRHeads(AttentionScore):
    r"""OCR heads: how often a head attends most to the written text while the model generates it.

    $$\text{OCR}[l,h] = \frac{1}{|G|}\sum_{i\in G}\big[\arg\max_j A^{l,h}[i,j] \in K^*\big]$$

    - $G$: the positions whose output is the answer's tokens; $K^*$: the visual tokens of the text's region.

    In [0, 1], averaged over samples. It is the retrieval-head rule with the copied text in the image, where no token
    of the prompt could equal the generated one: the position alone counts. Of equal entries the first is the largest.
    The answer is from `prepare(answer=...)`, where the paper decodes.

    Args:
        queries: G, name of a mask of tokens.

    Source: arXiv:2505.15865; as a case of the common formula, arXiv:2608.27417.

    Examples:
        >>> from hooked_mllm.metrics import OCRHeads
        >>> OCRHeads()
        OCRHeads(queries='generating')
    """

    def __init__(self, *, queries: str = "generating") -> None:
        super().__init__(queries=queries, keys="target", reduce="argmax")

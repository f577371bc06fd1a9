"""VisionMass: the attention that the question pays to all visual tokens."""

from hooked_mllm.checks import checked
from hooked_mllm.metrics.attention_score import AttentionScore


@checked
class VisionMass(AttentionScore):
    r"""Vision heads: the attention that the question's tokens pay to all visual tokens.

    $$\mathrm{VisionMass}[l,h] = \frac{1}{|Q|}\sum_{i\in Q}\sum_{j\in V} A^{l,h}[i,j]$$

    - $A^{l,h}[i,j]$: attention after the softmax, of head h in layer l, from position i to position j.
    - $V$: the visual tokens of all images and videos.

    In [0, 1], averaged over samples. The baseline that retrieval attention mass is compared with.

    Args:
        queries: Q, name of a mask of tokens: "question", "last", "text", "answer", ...

    Source: arXiv:2606.05843 section 4.2.

    Examples:
        >>> from hooked_mllm.metrics import VisionMass
        >>> VisionMass()
        VisionMass(queries='question')
    """

    def __init__(self, *, queries: str = "question") -> None:
        super().__init__(queries=queries, keys="visual", reduce="sum")

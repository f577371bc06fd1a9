"""QuestionContrast: attention that one question pays to a token, and other questions do not."""

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.heads.counting import Seed
from hooked_mllm.inputs.resolve import ModelInputs
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.shared_prefix import SharedPrefix
from hooked_mllm.metrics.annotation_free.questions import QuestionScore, question_groups


@checked
class QuestionContrast(QuestionScore):
    r"""How much attention a question draws to a few visual tokens, beyond what other questions draw there. No target.

    $$g_x^{l,h}[j] = a_x^{l,h}[j] - \frac{1}{m-1}\sum_{y\ne x} a_y^{l,h}[j],\qquad
    \text{score}[l,h] = \frac{1}{m}\sum_x \sum_{j\in T_x} \max\big(g_x^{l,h}[j],\, 0\big)$$

    - $x, y$: m questions about the same pictures; $a_x[j]$: mean attention of the tokens of x to visual token j.
    - $T_x$: the `ceil(share * |V|)` visual tokens that gain most. With `share=1` and two questions of equal visual mass
      the score is their total variation distance.

    In [0, 1], averaged over samples. A head that attends to the same tokens for every question scores 0; a head whose
    attention only spreads differently scores little, since few tokens are counted. The tokens that gain attention need
    not be the right ones.

    Args:
        queries: Name of the mask of query tokens.
        share: Share of the visual tokens whose gain counts, above 0 and at most 1.

    Source: the calibration by another query of arXiv:2506.09944, with real questions in place of "N/A" and the region
    that gains in place of the annotated one.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> samples, contrast = toys.VisualRetrieval().samples(model, 6), metrics.QuestionContrast()
        >>> scores = model.measure(contrast.groups(model, samples, n=2), contrast, progress=False)
        >>> sorted(scores.top(4))  # planted
        [(2, 4), (2, 5), (2, 6), (2, 7)]
    """

    advice = "Measure on `QuestionContrast.groups(model, samples)`."

    @staticmethod
    def groups(
        model: Model, samples: ModelInputs, questions: Sequence[str] | None = None, *, n: int = 4, seed: Seed = 0
    ) -> Iterator[SharedPrefix]:
        """Each sample's prompt with its question and `n` others; the common prefix is run once.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers; targets are not used.
            questions: The others are drawn from these; by default, from the samples' own.
            n: Number of other questions for each sample.
            seed: Seed of the draw.

        Raises:
            InputError: For too few questions, or a sample with an answer.
        """
        return question_groups(model, samples, questions, n, seed, lambda text: [text])

    def score(self, view: AttentionView) -> Float[Tensor, "layer 1 head"]:
        """The score of a group of questions."""
        if view.batch < 2:
            raise InputError(f"A contrast needs two questions at least; the batch holds {view.batch}. {self.advice}")
        a = self.profiles(view)
        others = (a.sum(1, keepdim=True) - a) / (view.batch - 1)
        return self.focused(a - others).mean(1, keepdim=True)

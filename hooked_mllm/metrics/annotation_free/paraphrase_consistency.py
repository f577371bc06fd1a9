"""ParaphraseConsistency: attention that all wordings of a question pay to a token, and other questions do not."""

from collections.abc import Callable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.heads.counting import Seed, Share
from hooked_mllm.inputs.resolve import ModelInputs
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.shared_prefix import SharedPrefix
from hooked_mllm.metrics.annotation_free.questions import QuestionScore, question_groups


@checked
class ParaphraseConsistency(QuestionScore):
    r"""How much attention all wordings of a question pay to a token, beyond other questions. No target.

    $$g_x^{l,h}[j] = \min_{w\in P(x)} a_w^{l,h}[j] - \operatorname*{mean}_{y\ne x,\; w\in P(y)} a_w^{l,h}[j],\qquad
    \text{score}[l,h] = \operatorname*{mean}_x \sum_{j\in T_x} \max\big(g_x^{l,h}[j],\, 0\big)$$

    - $P(x)$: `wordings` paraphrases of question x; $a_w[j]$: mean attention of the tokens of w to visual token j.
    - $T_x$: the `ceil(share * |V|)` visual tokens that gain most.

    In [0, 1], averaged over samples. As `QuestionContrast`, and it also subtracts attention that follows the words
    rather than the meaning: a token counts only with the attention that every wording pays to it.

    Args:
        wordings: Number of paraphrases of each question, at least 2.
        queries: Name of the mask of query tokens.
        share: Share of the visual tokens whose gain counts, above 0 and at most 1.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> samples = toys.VisualRetrieval(pages=1).samples(model, 2)
        >>> def paraphrase(question):
        ...     shape = f" {question.lower()}".rstrip(" ?.").split(" the ")[-1].split()[0]
        ...     return [f"What color is the {shape}?", f"Tell me the color of the {shape}."]
        >>> metric = metrics.ParaphraseConsistency(wordings=2)
        >>> scores = model.measure(metric.groups(model, samples, paraphrase, n=1), metric, progress=False)
        >>> scores.shape
        (6, 8)
    """

    advice = "Measure on `metric.groups(model, samples, paraphrase)`."

    def __init__(self, *, wordings: int = 2, queries: str = "question", share: Share = 0.01) -> None:
        super().__init__(queries=queries, share=share)
        if wordings < 2:
            raise InputError(f"wordings must be 2 at least, to agree or not; got {wordings!r}.")
        self.wordings = wordings

    def groups(
        self,
        model: Model,
        samples: ModelInputs,
        paraphrase: Callable[[str], Sequence[str]],
        questions: Sequence[str] | None = None,
        *,
        n: int = 2,
        seed: Seed = 0,
    ) -> Iterator[SharedPrefix]:
        """Each sample's prompt with its question and `n` others, each in all wordings.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches without answers; targets are not used.
            paraphrase: Returns wordings of a question, with or without its own; the first `wordings` are used.
            questions: The others are drawn from these; by default, from the samples' own.
            n: Number of other questions for each sample, which have no wording in common with its own.
            seed: Seed of the draw.

        Raises:
            InputError: For too few questions or wordings, or a sample with an answer.
        """

        def wordings(question: str) -> list[str]:
            texts = list(dict.fromkeys(paraphrase(question)))[: self.wordings]
            if len(texts) < self.wordings:
                raise InputError(
                    f"Expected {self.wordings} different wordings of {question!r}; the given function made "
                    f"{len(texts)}: {texts}."
                )
            return texts

        return question_groups(model, samples, questions, n, seed, wordings)

    def score(self, view: AttentionView) -> Float[Tensor, "layer 1 head"]:
        """The score of a group of questions."""
        n_questions, rest = divmod(view.batch, self.wordings)
        if rest or n_questions < 2:
            raise InputError(
                f"Expected two questions at least, {self.wordings} wordings each; the batch holds {view.batch} "
                f"prompts. {self.advice}"
            )
        # [layer prompt head visual] -> [layer question wording head visual]
        a = self.profiles(view).unflatten(1, (n_questions, self.wordings))
        mean = a.mean(2)
        others = (mean.sum(1, keepdim=True) - mean) / (n_questions - 1)
        return self.focused(a.amin(2) - others).mean(1, keepdim=True)

"""LogitDifference: how far the right answer's logit lies above wrong ones."""

from typing import Any

import torch
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.rows import at_least_float32, positions_of
from hooked_mllm.objectives.tokens import Tokens, answer_tokens, check_tokens, describe_tokens, padded, token_ids


class LogitDifference(Objective):
    r"""How far the logit of the right answer's first token lies above that of a wrong one.

    $$\frac{1}{|C|} \sum_{c \in C} \ell_c - \frac{1}{|W|} \sum_{w \in W} \ell_w$$

    read at the last position of the prompt; C and W are the correct and the wrong tokens, mostly one each. The
    softmax's normaliser cancels, so it equals the difference of log-probabilities, in nats (Wang et al. 2023, arXiv
    2211.00593).

    Args:
        correct: The right token: an id, a text that is one token, a list of these (their mean), or a function of the
            sample that gives one. None: the first token of the sample's own answer.
        wrong: The wrong token, given alike. Of a list, the correct ones are left out, so that one list of all possible
            answers serves every sample. None: the first token of the corrupted sample's answer.

    Raises:
        InputError: when bound: for a token outside the vocabulary, a text of several tokens, a sample without an
            answer, or wrong tokens of which none is left.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> task = toys.VisualRetrieval(pages=1)
        >>> sample = task.samples(model, 1, answer=True)[0]
        >>> difference = objectives.LogitDifference(wrong=task.answers)
        >>> bool(objectives.objective_values(model, sample, difference) > 0)
        True
    """

    def __init__(self, correct: Tokens | None = None, wrong: Tokens | None = None) -> None:
        self.correct = None if correct is None else check_tokens("correct", correct)
        self.wrong = None if wrong is None else check_tokens("wrong", wrong)

    def describe(self) -> dict[str, Any]:
        """What it is, as values that JSON can hold."""
        return {
            "objective": "LogitDifference",
            "correct": describe_tokens(self.correct),
            "wrong": describe_tokens(self.wrong),
        }

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        if self.correct is None:
            right = [[row[0]] for row in answer_tokens(model, inputs, "LogitDifference without `correct=`").tolist()]
        else:
            right = token_ids(model, "correct", self.correct, inputs)
        wrong = self._wrong(model, inputs, corrupted)
        rest = [[w for w in ws if w not in cs] for ws, cs in zip(wrong, right, strict=True)]
        if not all(rest):
            at = next(i for i, left in enumerate(rest) if not left)
            raise InputError(
                f"No wrong token is left for sample {at}: its wrong tokens {wrong[at]} are all correct ones. "
                + (
                    "The corrupted sample has the same answer: name `wrong=`, such as the list of all possible answers."
                    if self.wrong is None
                    else "Name another token, or a list of them, as `wrong=`."
                )
            )
        tokens = padded([[*c, *w] for c, w in zip(right, rest, strict=True)], 0)
        weights = torch.zeros(tokens.shape, dtype=torch.float64)
        for row, c, w in zip(weights, right, rest, strict=True):
            row[: len(c)] = 1 / len(c)
            row[len(c) : len(c) + len(w)] = -1 / len(w)

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            chosen = at_least_float32(logits[:, 0].gather(1, tokens.to(logits.device)))
            share = weights.to(chosen)
            return (chosen * share).masked_fill(share == 0, 0.0).sum(1)

        return BoundObjective(self, positions_of(inputs, "last"), score)

    def _wrong(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None) -> list[list[int]]:
        if self.wrong is not None:
            return token_ids(model, "wrong", self.wrong, inputs)
        if corrupted is None:
            raise InputError(
                "LogitDifference has no wrong token: give `wrong=`, such as the list of all possible answers, or a "
                "corrupted sample with an answer of its own."
            )
        if corrupted.batch != inputs.batch:
            raise InputError(f"Expected {inputs.batch} corrupted samples, one for each; got {corrupted.batch}.")
        answers = answer_tokens(model, corrupted, "LogitDifference without `wrong=`, of the corrupted sample,")
        return [[row[0]] for row in answers.tolist()]

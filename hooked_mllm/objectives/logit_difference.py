"""LogitDifference: the logit of the correct answer minus that of wrong ones."""

from typing import Any

import torch
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.logits import at_least_float32, logit_positions
from hooked_mllm.objectives.tokens import Tokens, answer_tokens, check_tokens, describe_tokens, padded, token_ids


@checked
class LogitDifference(Objective):
    r"""The logit of the correct answer's first token minus that of a wrong one.

    $$\frac{1}{|C|} \sum_{c \in C} \ell_c - \frac{1}{|W|} \sum_{w \in W} \ell_w$$

    read at the last position of the prompt; C and W are the correct and the wrong tokens. It equals the difference of
    log-probabilities, in nats (Wang et al. 2023, arXiv 2211.00593).

    Args:
        correct: The correct token: an id, a text that is one token, a list of these (their mean), or a function of the
            sample. None: the first token of the sample's own answer.
        wrong: The wrong token, in the same forms; correct tokens in a list are ignored. None: the first token of the
            corrupted sample's answer.

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
        """The objective and its tokens, as values that JSON can hold."""
        tokens = {"correct": describe_tokens(self.correct), "wrong": describe_tokens(self.wrong)}
        return {"objective": "LogitDifference", **tokens}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        if self.correct is None:
            correct = answer_tokens(model, inputs, "LogitDifference without `correct=`")[:, :1].tolist()
        else:
            correct = token_ids(model, "correct", self.correct, inputs)
        candidates = self._wrong(model, inputs, corrupted)
        wrong = [[w for w in ws if w not in cs] for ws, cs in zip(candidates, correct, strict=True)]
        if [] in wrong:
            sample = wrong.index([])
            raise InputError(
                f"No wrong token is left for sample {sample}: its wrong tokens {candidates[sample]} are all correct "
                "ones. Specify others as `wrong=`, such as the list of all possible answers; without it, the corrupted "
                "sample must have another answer."
            )
        tokens = padded([[*c, *w] for c, w in zip(correct, wrong, strict=True)], 0)  # [batch token]
        weights = torch.zeros(tokens.shape, dtype=torch.float64)
        for weight, c, w in zip(weights, correct, wrong, strict=True):
            weight[: len(c)] = 1 / len(c)
            weight[len(c) : len(c) + len(w)] = -1 / len(w)

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            # [batch 1 d_vocab] -> [batch token]
            token_logits = at_least_float32(logits[:, 0].gather(1, tokens.to(logits.device)))
            weight = weights.to(token_logits)
            # a padding token may have an infinite logit
            return (token_logits * weight).masked_fill(weight == 0, 0.0).sum(1)

        return BoundObjective(self, logit_positions(inputs, "last"), score)

    def _wrong(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None) -> list[list[int]]:
        if self.wrong is not None:
            return token_ids(model, "wrong", self.wrong, inputs)
        if corrupted is None:
            raise InputError(
                "LogitDifference has no wrong token: specify `wrong=`, such as the list of all possible answers, or a "
                "corrupted sample with another answer."
            )
        if corrupted.batch != inputs.batch:
            raise InputError(f"Expected {inputs.batch} corrupted samples, one for each; got {corrupted.batch}.")
        what = "LogitDifference without `wrong=`, of the corrupted sample,"
        return answer_tokens(model, corrupted, what)[:, :1].tolist()

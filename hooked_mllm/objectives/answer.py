"""Objectives of the sample's answer: its log-probability, and whether greedy decoding gives it."""

from typing import Any

from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.logits import at_least_float32, log_probabilities, logit_positions
from hooked_mllm.objectives.tokens import Tokens, answer_tokens, check_tokens, describe_tokens, padded, token_ids


@checked
class AnswerLogProb(Objective):
    r"""The log-probability of the answer, in nats, summed over its tokens.

    $$\sum_{t=1}^{T} \log p(a_t \mid \text{prompt}, a_{<t})$$

    The sample is prepared with `answer=`, which appends the answer to the prompt (teacher forcing).

    Args:
        answer: Replaces the sample's own answer by one token (an id, a text that is one token, or a function of the
            sample), read at the last position of the prompt. The probabilities of a list of tokens are added.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> log_p = objectives.objective_values(model, sample, objectives.AnswerLogProb())
        >>> bool((log_p > -0.7) & (log_p <= 0))
        True
    """

    def __init__(self, answer: Tokens | None = None) -> None:
        self.answer = None if answer is None else check_tokens("answer", answer)

    def describe(self) -> dict[str, Any]:
        """The objective and its settings, as values that JSON can hold."""
        return {"objective": "AnswerLogProb", "answer": describe_tokens(self.answer)}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        if self.answer is None:
            tokens = answer_tokens(model, inputs, "AnswerLogProb")[:, :, None]  # [batch n 1]
        else:
            tokens = padded(token_ids(model, "answer", self.answer, inputs), -1)[:, None]  # [batch 1 alternative]

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            index = tokens.to(logits.device)
            absent = index < 0
            log_p = log_probabilities(logits).gather(2, index.clamp(min=0))  # [batch n alternative]
            log_p = log_p.masked_fill(absent, -float("inf")).logsumexp(2)  # -> [batch n]
            return log_p.masked_fill(absent.all(2), 0.0).sum(1)

        return BoundObjective(self, logit_positions(inputs, "generating" if self.answer is None else "last"), score)


@checked
class GreedyAccuracy(Objective):
    """1 where greedy decoding gives the sample's answer, else 0; one forward pass, without decoding.

    Every token of the answer must be the most likely one after the prompt and the answer's previous tokens. To require
    that the answer ends there, end `answer=` with the token that ends a turn. The result is that of
    `model.generate(..., do_sample=False)` without a repetition penalty. The answer is part of the prefill: an
    intervention of phase "prefill" or "both" edits it, one of "decode" does not.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> objectives.objective_values(model, sample, objectives.GreedyAccuracy())
        tensor([1.])
    """

    differentiable = False

    def describe(self) -> dict[str, Any]:
        """The objective, as values that JSON can hold."""
        return {"objective": "GreedyAccuracy"}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        tokens = answer_tokens(model, inputs, "GreedyAccuracy")  # [batch n]

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            index = tokens.to(logits.device)
            largest, most_likely = at_least_float32(logits).max(-1)  # [batch n d_vocab] -> [batch n]
            correct = ((most_likely == index) | (index < 0)).all(1)
            return correct.to(largest.dtype).masked_fill(largest.isnan().any(1), float("nan"))

        return BoundObjective(self, logit_positions(inputs, "generating"), score)

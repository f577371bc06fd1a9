"""Objectives of the answer that a sample has: its log-probability, and whether greedy decoding gives it."""

from typing import Any

from jaxtyping import Int
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.rows import at_least_float32, positions_of
from hooked_mllm.objectives.tokens import Tokens, answer_tokens, check_tokens, describe_tokens, padded, token_ids


class AnswerLogProb(Objective):
    r"""The log-probability of the answer, in nats: summed over its tokens, each given the ones before it.

    $$\sum_{t=1}^{T} \log p(a_t \mid \text{prompt}, a_{<t})$$

    The sample is prepared with `answer=`, which puts the answer after the prompt (teacher forcing); position t - 1
    tells token t.

    Args:
        answer: In place of the sample's own answer: one token (an id, a text that is one token, or a function of the
            sample), read at the last position of the prompt. Of a list, the probabilities are added.

    Raises:
        InputError: when bound: for a sample without an answer, one that the tokenizer does not know, or an `answer` of
            several tokens.

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
        """What it is, as values that JSON can hold."""
        return {"objective": "AnswerLogProb", "answer": describe_tokens(self.answer)}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        if self.answer is not None:
            return self._one_token(padded(token_ids(model, "answer", self.answer, inputs), -1), inputs)
        tokens = answer_tokens(model, inputs, "AnswerLogProb")

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            index = tokens.to(logits.device)
            log_p = at_least_float32(logits).log_softmax(-1).gather(2, index.clamp(min=0)[..., None])[..., 0]
            return log_p.masked_fill(index < 0, 0.0).sum(1)

        return BoundObjective(self, positions_of(inputs, "generating"), score)

    def _one_token(self, tokens: Int[Tensor, "batch n"], inputs: ResolvedInput) -> BoundObjective:
        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            index = tokens.to(logits.device)
            log_p = at_least_float32(logits[:, 0]).log_softmax(-1).gather(1, index.clamp(min=0))
            return log_p.masked_fill(index < 0, -float("inf")).logsumexp(1)

        return BoundObjective(self, positions_of(inputs, "last"), score)


class GreedyAccuracy(Objective):
    """1 where greedy decoding gives the sample's answer, else 0; one forward pass, without decoding.

    Every token of the answer must be the most likely one given the prompt and the answer's tokens before it. That is
    greedy decoding: as long as its tokens are the answer's it goes on from the very same sequence, so it gives the
    answer if and only if no step departs from it. What it would say after the answer is not looked at; put the token
    that ends a turn into `answer=` to ask for an answer that stops there.

    It agrees with `model.generate(..., do_sample=False)` as far as the checkpoint's generation settings decode greedily
    (without a repetition penalty), and under interventions that act on the answer as on generated tokens (phase
    "both"). The answer stands in the prefill here, where one of phase "prefill" reaches it and "decode" does not.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> objectives.objective_values(model, sample, objectives.GreedyAccuracy())
        tensor([1.])
    """

    differentiable = False

    def describe(self) -> dict[str, Any]:
        """What it is, as values that JSON can hold."""
        return {"objective": "GreedyAccuracy"}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        tokens = answer_tokens(model, inputs, "GreedyAccuracy")

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            index = tokens.to(logits.device)
            largest, best = at_least_float32(logits).max(-1)
            right = ((best == index) | (index < 0)).all(1)
            return right.to(largest.dtype).masked_fill(largest.isnan().any(1), float("nan"))

        return BoundObjective(self, positions_of(inputs, "generating"), score)

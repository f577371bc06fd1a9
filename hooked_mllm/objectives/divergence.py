"""KLDivergence: how far a run's next-token distribution has moved from that of the clean run."""

from typing import Any

from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.rows import at_least_float32, positions_of


class KLDivergence(Objective):
    r"""How far the next-token distribution q of a run has moved from that of the clean run, p, in nats.

    $$\mathrm{KL}(p \,\|\, q) = \sum_v p_v \log \frac{p_v}{q_v}$$

    the mean over the positions that are read. It needs no answer. Zero is the clean run itself, so smaller is better.

    Args:
        positions: Which positions are read: "last", or any way of naming positions, such as "generating".

    Examples:
        >>> from hooked_mllm import HeadAblation, HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> inputs = model.resolve(toys.VisualRetrieval(pages=1).samples(model, 1)[0])
        >>> bound = objectives.KLDivergence().bind(model, inputs)
        >>> bound = bound.with_clean(objectives.logits_at(model, inputs, bound.positions))
        >>> with model.intervene(HeadAblation("L2H4, L2H5, L2H6, L2H7", mode="zero", phase="prefill")):
        ...     bool(objectives.objective_values(model, inputs, bound) > 0.1)
        True
    """

    larger_is_better = False
    needs_clean = True

    def __init__(self, positions: Positions = "last") -> None:
        check_positions(positions)
        self.positions = positions

    def describe(self) -> dict[str, Any]:
        """What it is, as values that JSON can hold."""
        return {"objective": "KLDivergence", "positions": describe_positions(self.positions)}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        positions = positions_of(inputs, self.positions)

        def score(logits: Tensor, clean: Tensor | None) -> Tensor:
            assert clean is not None
            log_p = at_least_float32(clean.to(logits.device)).log_softmax(-1)
            log_q = at_least_float32(logits).log_softmax(-1)
            p = log_p.exp()
            # 0 log 0 is 0, also where a hook put a logit at minus infinity
            terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1)
            there = (positions >= 0).to(logits.device)
            return terms.masked_fill(~there, 0.0).sum(1) / there.sum(1)

        return BoundObjective(self, positions, score)

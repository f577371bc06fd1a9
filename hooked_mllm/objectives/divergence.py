"""KLDivergence: the distance of a run's next-token distribution from that of the clean run."""

from typing import Any

from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.logits import log_probabilities, logit_positions


@checked
class KLDivergence(Objective):
    r"""The divergence of a run's next-token distribution q from that of the clean run, p, in nats.

    $$\mathrm{KL}(p \,\|\, q) = \sum_v p_v \log \frac{p_v}{q_v}$$

    averaged over the positions. It needs no answer. The clean run itself has 0; smaller is better.

    Args:
        positions: The positions that are read, in any form of positions, such as "last" or "generating".

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
        """The objective and its positions, as values that JSON can hold."""
        return {"objective": "KLDivergence", "positions": describe_positions(self.positions)}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        positions = logit_positions(inputs, self.positions)

        def score(logits: Tensor, clean: Tensor | None) -> Tensor:
            assert clean is not None
            log_p, log_q = log_probabilities(clean.to(logits.device)), log_probabilities(logits)
            p = log_p.exp()
            # 0 log 0 is 0, also where a hook set a logit to minus infinity
            terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1)  # [batch n d_vocab] -> [batch n]
            exists = (positions >= 0).to(logits.device)
            return terms.masked_fill(~exists, 0.0).sum(1) / exists.sum(1)

        return BoundObjective(self, positions, score)

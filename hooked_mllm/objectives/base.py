"""The interface of objectives: the logits that one reads, and the number that it computes from them for each sample."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ResolvedInput

#: takes logits `[batch n d_vocab]` and those of the clean run, or None; returns `[batch]`
Score = Callable[[Tensor, Tensor | None], Tensor]


@checked
class Objective(ABC):
    """What an experiment measures: one number for each sample, computed from the logits of a run.

    A subclass defines `bind` and `describe`. An object can be used many times, with several models.

    Attributes:
        larger_is_better: Whether larger values mean a better model.
        needs_clean: Whether it compares with the logits of another run; see `BoundObjective.with_clean`.
        differentiable: Whether gradients flow through it to the logits.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> class LargestLogit(objectives.Objective):
        ...     def bind(self, model, inputs, corrupted=None):
        ...         def score(logits, clean):
        ...             return logits[:, 0].float().amax(-1)
        ...         return objectives.BoundObjective(self, inputs.positions("last"), score)
        ...     def describe(self):
        ...         return {"objective": "LargestLogit"}
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> objectives.objective_values(model, sample, LargestLogit()).shape
        torch.Size([1])
    """

    larger_is_better: bool = True
    needs_clean: bool = False
    differentiable: bool = True

    @abstractmethod
    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> "BoundObjective":
        """The objective for these inputs: the positions to read, and the function of the logits there.

        Args:
            model: A `HookedMLLM`.
            inputs: The inputs of the run, as `model.resolve` returns them.
            corrupted: The corrupted counterpart of the inputs, for objectives that read it.

        Raises:
            InputError: For tokens that the vocabulary lacks, or a sample without the answer that the objective needs.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The objective and its settings, as values that JSON can hold."""

    def __repr__(self) -> str:
        settings = {k: v for k, v in self.describe().items() if k != "objective" and v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


@checked
@dataclass(frozen=True, eq=False, repr=False)
class BoundObjective:
    """An objective for given inputs: called with the logits at `positions`, it returns one number for each sample.

    Attributes:
        objective: The objective that was bound.
        positions: Positions whose logits are read, `[batch n]`, in the padded sequence; -1 for none.
        score: Computes the values: `(logits [batch n d_vocab], clean or None) -> [batch]`.
        clean: The logits of the clean run at these positions.
    """

    objective: Objective
    positions: Int[Tensor, "batch n"]
    score: Score
    clean: Float[Tensor, "batch n d_vocab"] | None = None

    def __call__(self, logits: Float[Tensor, "batch n d_vocab"]) -> Float[Tensor, " batch"]:
        """The objective of each sample, in float32 or float64; `logits` are those at `positions`."""
        self._check(logits)
        self.check_clean()
        return self.score(logits, self.clean)

    def check_clean(self) -> None:
        """Raise if the objective compares with a clean run and its logits are missing."""
        if self.objective.needs_clean and self.clean is None:
            raise InputError(
                f"{self.objective!r} compares with a clean run, whose logits are missing: bind it, add them by "
                "`bound.with_clean(logits_at(model, clean_inputs, bound.positions))`, and use the result."
            )

    def with_clean(self, logits: Float[Tensor, "batch n d_vocab"]) -> "BoundObjective":
        """A copy with the logits of the clean run, detached from their graph."""
        self._check(logits)
        return replace(self, clean=logits.detach())

    def _check(self, logits: Tensor) -> None:
        if logits.dim() != 3 or logits.shape[:2] != self.positions.shape:
            raise InputError(
                f"{self.objective!r} reads logits [batch n d_vocab] at its positions {tuple(self.positions.shape)}; "
                f"got {tuple(logits.shape)}. `gather_logits(logits, bound.positions)` selects them from all logits."
            )

    def __repr__(self) -> str:
        return f"BoundObjective({self.objective!r}, positions={self.positions.tolist()})"

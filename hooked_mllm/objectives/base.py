"""What every objective is: rows of the logits that it reads, and one number a sample made of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ResolvedInput

#: takes logits `[batch n d_vocab]` and those of the clean run, or None; returns `[batch]`
Score = Callable[[Tensor, Tensor | None], Tensor]


class Objective(ABC):
    """What an experiment watches: one number a sample, made of the logits of a run.

    A subclass says in `bind` which rows of the logits it reads for given inputs and what it makes of them, and in
    `describe` what it is. One object may be used many times, and on several models.

    Attributes:
        larger_is_better: Whether a model that does better has more of it.
        needs_clean: Whether it compares with the logits of another run; see `BoundObjective.with_clean`.
        differentiable: Whether gradients flow through it to the logits.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> class LargestLogit(objectives.Objective):
        ...     def bind(self, model, inputs, corrupted=None):
        ...         rows = objectives.rows.positions_of(inputs, "last")
        ...         return objectives.BoundObjective(self, rows, lambda logits, clean: logits[:, 0].float().amax(-1))
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
        """The objective for these inputs: checked against the model's vocabulary and the inputs' answers.

        Args:
            model: A `HookedMLLM`.
            inputs: What the model runs on, as `model.resolve` gives it.
            corrupted: The corrupted counterpart of the inputs, for objectives that read it.

        Raises:
            InputError: for tokens outside the vocabulary, or a sample without the answer that the objective needs.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What it is, as values that JSON can hold."""

    def __repr__(self) -> str:
        told = {k: v for k, v in self.describe().items() if k != "objective" and v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in told.items())})"


@dataclass(frozen=True, eq=False, repr=False)
class BoundObjective:
    """An objective for given inputs: called with the logits at `positions`, it gives one number a sample.

    Attributes:
        objective: What was bound.
        positions: Rows of the logits that are read, `[batch n]`, counted in the padded sequence; -1 where a sample has
            fewer than the others.
        score: What is made of them: `(logits [batch n d_vocab], clean or None) -> [batch]`.
        clean: The logits of the clean run at these positions.
    """

    objective: Objective
    positions: Int[Tensor, "batch n"]
    score: Score
    clean: Float[Tensor, "batch n d_vocab"] | None = None

    def __call__(self, logits: Float[Tensor, "batch n d_vocab"]) -> Float[Tensor, " batch"]:
        """The objective of each sample, in float32 at least.

        Args:
            logits: The logits at `positions`, as `gather_logits` and `logits_at` give them.

        Raises:
            InputError: for logits of other positions, or without the clean logits that the objective needs.
        """
        self._check(logits)
        if self.objective.needs_clean and self.clean is None:
            raise InputError(
                f"{type(self.objective).__name__} compares with the clean run, whose logits it was not given: call "
                "`bound.with_clean(logits_at(model, clean_inputs, bound.positions))` first."
            )
        return self.score(logits, self.clean)

    def with_clean(self, logits: Float[Tensor, "batch n d_vocab"]) -> "BoundObjective":
        """The same with the logits of the clean run, which are held without their graph."""
        self._check(logits)
        return replace(self, clean=logits.detach())

    def _check(self, logits: Tensor) -> None:
        if logits.dim() != 3 or logits.shape[:2] != self.positions.shape:
            raise InputError(
                f"{self.objective!r} reads logits [batch n d_vocab] at its positions {tuple(self.positions.shape)}; "
                f"got {tuple(logits.shape)}. `gather_logits(logits, bound.positions)` takes them out of all logits."
            )

    def __repr__(self) -> str:
        return f"BoundObjective({self.objective!r}, positions={self.positions.tolist()})"

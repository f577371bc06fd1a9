"""FunctionObjective: a plain function of the logits as an objective."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.rows import at_least_float32, positions_of


class FunctionObjective(Objective):
    """A plain function as an objective: larger is taken to be better, and gradients flow as far as it lets them.

    Args:
        fn: Takes logits `[batch n d_vocab]` in float32 and returns one number a sample, `[batch]`.
        positions: Which positions it is given: "last", or any way of naming as many in every sample.

    Raises:
        InputError: for something that is no function; in a run, when it returns another shape.
        LayoutError: when bound: for positions of which samples have unequal numbers.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> entropy = lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(1)
        >>> objectives.objective_values(model, sample, entropy).shape
        torch.Size([1])
    """

    def __init__(self, fn: Callable[..., Any], positions: Positions = "last") -> None:
        if not callable(fn) or isinstance(fn, type):
            raise InputError(f"Expected a function of logits [batch n d_vocab]; got {_named(fn)}.")
        check_positions(positions)
        self.fn, self.positions = fn, positions

    def describe(self) -> dict[str, Any]:
        """What it is, as values that JSON can hold."""
        return {
            "objective": "FunctionObjective",
            "function": _named(self.fn),
            "positions": describe_positions(self.positions),
        }

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        positions = positions_of(inputs, self.positions)
        if bool((positions < 0).any()):
            counts = (positions >= 0).sum(1).tolist()
            raise LayoutError(
                f"A function is given as many positions of every sample; {self.positions!r} are {counts} of these "
                "samples. Run them one by one, or give other positions."
            )

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            values = self.fn(at_least_float32(logits))
            if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise InputError(
                    f"{_named(self.fn)} must return one number a sample, a tensor ({len(logits)},); got {got}."
                )
            return at_least_float32(values)

        return BoundObjective(self, positions, score)


def as_objective(value: Any) -> Objective:
    """An objective as it is, a plain function as a `FunctionObjective` of the last position of the prompt.

    Raises:
        InputError: for anything else.

    Examples:
        >>> as_objective(lambda logits: logits[:, 0, 7])
        FunctionObjective(function='<lambda>', positions='last')
    """
    if isinstance(value, Objective):
        return value
    if isinstance(value, type) and issubclass(value, Objective):
        raise InputError(f"Expected an objective; got the class {value.__name__}. Make one: {value.__name__}().")
    if callable(value) and not isinstance(value, type | BoundObjective):
        return FunctionObjective(value)
    raise InputError(
        "Expected an objective such as LogitDifference() or AnswerLogProb(), or a function of logits [batch n d_vocab] "
        f"to [batch]; got {_named(value)}."
    )


def _named(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)

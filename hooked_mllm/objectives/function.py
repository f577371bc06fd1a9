"""FunctionObjective: a plain function of the logits as an objective."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives.base import BoundObjective, Objective
from hooked_mllm.objectives.logits import at_least_float32, logit_positions

if TYPE_CHECKING:
    #: an objective, bound or not, or a function of logits `[batch 1 d_vocab]`, the prompt's last, to `[batch]`
    ObjectiveLike = Objective | BoundObjective | Callable[[Tensor], Tensor]
else:  # at run time anything, so that another value reaches the check whose error states what was expected
    ObjectiveLike = Any


@checked
class FunctionObjective(Objective):
    """A plain function as an objective; gradients flow if the function allows it.

    Args:
        fn: Takes logits `[batch n d_vocab]` in float32 and returns one number for each sample, `[batch]`.
        positions: Positions whose logits it takes, the same number in every sample.
        larger_is_better: Whether larger values mean a better model; False for a loss or an error.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> entropy = lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(1)
        >>> objectives.objective_values(model, sample, entropy).shape
        torch.Size([1])
    """

    def __init__(self, fn: Callable[..., Any], positions: Positions = "last", *, larger_is_better: bool = True) -> None:
        if not callable(fn) or isinstance(fn, type):
            raise InputError(f"Expected a function of logits [batch n d_vocab]; got {_name(fn)}.")
        check_positions(positions)
        self.fn, self.positions, self.larger_is_better = fn, positions, larger_is_better

    def describe(self) -> dict[str, Any]:
        """The function's name and its positions, as values that JSON can hold."""
        positions = describe_positions(self.positions)
        settings = {"objective": "FunctionObjective", "function": _name(self.fn), "positions": positions}
        return settings if self.larger_is_better else {**settings, "larger_is_better": False}

    def bind(self, model: Model, inputs: ResolvedInput, corrupted: ResolvedInput | None = None) -> BoundObjective:
        """The objective for these inputs; see `Objective.bind`."""
        positions = logit_positions(inputs, self.positions)
        if bool((positions < 0).any()):
            counts = (positions >= 0).sum(1).tolist()
            raise LayoutError(
                f"A function takes the same number of positions of every sample; {self.positions!r} are {counts} of "
                "these samples. Run each sample alone, or specify other positions."
            )

        def score(logits: Tensor, _: Tensor | None) -> Tensor:
            values = self.fn(at_least_float32(logits))
            if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                expected = f"one number for each sample, a tensor ({len(logits)},)"
                raise InputError(f"{_name(self.fn)} must return {expected}; got {got}.")
            return at_least_float32(values)

        return BoundObjective(self, positions, score)


@checked
def as_objective(value: ObjectiveLike) -> Objective:
    """An objective unchanged, a plain function as a `FunctionObjective` of the last position of the prompt.

    Raises:
        InputError: For anything else.

    Examples:
        >>> as_objective(lambda logits: logits[:, 0, 7])
        FunctionObjective(function='<lambda>', positions='last')
    """
    if isinstance(value, Objective):
        return value
    if isinstance(value, type) and issubclass(value, Objective):
        raise InputError(f"Expected an objective; got the class {value.__name__}. Create one: {value.__name__}().")
    if callable(value) and not isinstance(value, type | BoundObjective):
        return FunctionObjective(value)
    raise InputError(
        "Expected an objective such as LogitDifference() or AnswerLogProb(), or a function of logits [batch n d_vocab] "
        f"to [batch]; got {_name(value)}."
    )


def _name(value: object) -> str:
    return getattr(value, "__name__", type(value).__name__)

"""`objective_values`: an objective's value on the samples of one forward pass."""

from jaxtyping import Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import NumericsError
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput
from hooked_mllm.objectives.base import BoundObjective
from hooked_mllm.objectives.function import ObjectiveLike, as_objective
from hooked_mllm.objectives.logits import logits_at


def bound_objective(
    model: Model, inputs: ResolvedInput, objective: ObjectiveLike, corrupted: ModelInput | ResolvedInput | None = None
) -> BoundObjective:
    """An objective bound to these inputs; one that is bound already is returned unchanged."""
    if isinstance(objective, BoundObjective):
        return objective
    if corrupted is not None and not isinstance(corrupted, ResolvedInput):
        corrupted = model.resolve(corrupted)
    return as_objective(objective).bind(model, inputs, corrupted)


@checked
def objective_values(
    model: Model,
    inputs: ModelInput | ResolvedInput,
    objective: ObjectiveLike,
    corrupted: ModelInput | ResolvedInput | None = None,
) -> Float[Tensor, " batch"]:
    """An objective's value on each sample: one forward pass, unembedding only the positions that are read.

    Registered hooks and interventions apply, and gradients flow if they are enabled.

    Args:
        model: A `HookedMLLM`.
        inputs: A sample, a batch, or a mapping of model inputs.
        objective: An objective, bound or not, or a function of logits `[batch n d_vocab]` to `[batch]`.
        corrupted: The corrupted counterpart of the inputs, for objectives that read it.

    Raises:
        InputError: For an objective that does not fit the inputs, or needs the logits of a clean run.
        NumericsError: For values that are NaN.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> difference = objectives.LogitDifference("red", wrong=["green", "blue"])
        >>> objectives.objective_values(model, sample, difference).shape
        torch.Size([1])
    """
    resolved = inputs if isinstance(inputs, ResolvedInput) else model.resolve(inputs)
    bound = bound_objective(model, resolved, objective, corrupted)
    bound.check_clean()
    values = bound(logits_at(model, resolved, bound.positions))
    if bool(values.isnan().any()):
        raise NumericsError(
            f"{bound.objective!r} is not a number: the logits overflowed or a hook made them NaN. Load a model in "
            "float16 with dtype='bfloat16' or 'float32'."
        )
    return values

"""`objective_values`: an objective's value on the samples of one forward pass."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput
from hooked_mllm.objectives.base import BoundObjective
from hooked_mllm.objectives.function import as_objective
from hooked_mllm.objectives.rows import logits_at


def objective_values(
    model: Model,
    inputs: ModelInput | ResolvedInput,
    objective: Any,
    corrupted: ModelInput | ResolvedInput | None = None,
) -> Float[Tensor, " batch"]:
    """An objective's value on each sample: one forward pass, unembedding only the positions that are read.

    Hooks and interventions that hang on the model act. Gradients flow if they are enabled: use `torch.no_grad()` where
    they are not wanted.

    Args:
        model: A `HookedMLLM`.
        inputs: A sample, a batch, or a mapping of model inputs.
        objective: An objective, one that is bound already, or a function of logits `[batch n d_vocab]` to `[batch]`.
        corrupted: The corrupted counterpart of the inputs, for objectives that read it.

    Raises:
        InputError: for an objective that does not fit the inputs, or needs the logits of a clean run.
        NumericsError: for values that are not a number.

    Examples:
        >>> from hooked_mllm import HookedMLLM, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> difference = objectives.LogitDifference("red", wrong=["green", "blue"])
        >>> objectives.objective_values(model, sample, difference).shape
        torch.Size([1])
    """
    resolved = inputs if isinstance(inputs, ResolvedInput) else model.resolve(inputs)
    bound = objective
    if not isinstance(bound, BoundObjective):
        if corrupted is not None and not isinstance(corrupted, ResolvedInput):
            corrupted = model.resolve(corrupted)
        bound = as_objective(objective).bind(model, resolved, corrupted)
    if bound.objective.needs_clean and bound.clean is None:
        raise InputError(
            f"{bound.objective!r} compares with a clean run: bind it, give it that run's logits by `with_clean`, and "
            "pass what you get. See the example of KLDivergence."
        )
    values = bound(logits_at(model, resolved, bound.positions))
    if bool(values.isnan().any()):
        raise NumericsError(
            f"{bound.objective!r} is not a number: the logits overflowed or a hook made them NaN. A model in float16 "
            "wants dtype='bfloat16' or 'float32'."
        )
    return values

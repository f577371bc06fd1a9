"""One variant of a run: the interventions that make it, and the block from which it differs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks import HookFunction, HookPoint
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.interventions import Intervention
from hooked_mllm.interventions.base import Edit

#: an intervention, or a sequence of several that make one variant; anything else is refused with a word
Variant = Any


@dataclass(frozen=True)
class Prepared:
    """A variant, checked against the model.

    Attributes:
        number: Its place among all variants.
        interventions: What makes it.
        edits: Hook points and what is done there.
        layer: The first block that it changes; None where something before the first block, or behind the last one,
            is edited.
        last: The last block that it edits.
        first: The first position whose row it changes.
    """

    number: int
    interventions: tuple[Intervention, ...]
    edits: tuple[tuple[str, Edit], ...]
    layer: int | None
    last: int
    first: int


def prepare(model: Model, variants: Sequence[Variant], inputs: ResolvedInput) -> list[Prepared]:
    """Check every variant before anything runs.

    Raises:
        HookValueError: for anything but interventions.
        HookNameError: for a hook point that the model lacks.
    """
    prepared = []
    for number, variant in enumerate(variants):
        several = isinstance(variant, list | tuple)
        chosen: tuple[Any, ...] = tuple(variant) if several else (variant,)
        for each in chosen:
            if not isinstance(each, Intervention):
                raise HookValueError(
                    f"A variant is an intervention or several, such as HeadAblation(...); got {type(each).__name__}."
                )
        edits = tuple(edit for each in chosen for edit in each.edits(model))
        points = [model.registry[name] for name, _ in edits]
        inside = [p.layer() if p.tower == "text" and p.name.startswith("blocks.") else None for p in points]
        known = [layer for layer in inside if layer is not None]
        layer = min(known) if known and len(known) == len(inside) else None
        first = min((each.first_position(model, inputs) for each in chosen), default=0)
        prepared.append(Prepared(number, chosen, edits, layer, max(known, default=-1), first))
    return prepared


def on_rows(entries: Sequence[tuple[int, Edit]], samples: int, repeats: int) -> HookFunction:
    """One hook that gives each variant of a batch its own edit.

    Args:
        entries: Which variant of the batch has which edit.
        samples: Samples in the run.
        repeats: Variants in the batch; row `sample * repeats + variant`.
    """

    def edit(activation: Tensor, hook: HookPoint) -> Tensor:
        out = activation.clone()
        split = out.unflatten(0, (samples, repeats))
        for variant, change in entries:
            own = split[:, variant]
            new = change(own, hook)
            if new is not None and new is not own:
                own.copy_(new)
        return out

    return edit

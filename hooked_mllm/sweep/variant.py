"""One variant of a run: its interventions, and the blocks and positions that they change."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks import HookFunction, HookPoint
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.interventions import Intervention
from hooked_mllm.interventions.base import Edit

if TYPE_CHECKING:
    #: an intervention, or several that make one variant
    Variant = Intervention | Sequence[Intervention]
else:  # at run time anything, so that another value reaches the check whose error states what was expected
    Variant = Any


@dataclass(frozen=True)
class Prepared:
    """A variant, checked against the model."""

    number: int  # its index among all variants
    interventions: tuple[Intervention, ...]
    edits: tuple[tuple[str, Edit], ...]  # by names of hook points
    layer: int | None  # the first block that it changes; None if it edits something outside the blocks
    last: int  # the last block that it edits
    first: int  # the first position that it changes


def prepare(model: Model, variants: Sequence[Variant], inputs: ResolvedInput) -> list[Prepared]:
    """Variants checked before anything runs; raises for values that are no interventions, or do not fit the model."""
    prepared = []
    for number, variant in enumerate(variants):
        interventions: tuple[Any, ...] = tuple(variant) if isinstance(variant, list | tuple) else (variant,)
        for each in interventions:
            if not isinstance(each, Intervention):
                raise HookValueError(
                    f"A variant is an intervention or several, such as HeadAblation(...); got {type(each).__name__}."
                )
        edits = tuple(edit for each in interventions for edit in each.edits(model))
        points = [model.registry[name] for name, _ in edits]
        layers = [p.layer() if p.tower == "text" and p.name.startswith("blocks.") else None for p in points]
        in_blocks = [layer for layer in layers if layer is not None]
        layer = min(in_blocks) if in_blocks and len(in_blocks) == len(layers) else None
        first = min((each.first_position(model, inputs) for each in interventions), default=0)
        prepared.append(Prepared(number, interventions, edits, layer, max(in_blocks, default=-1), first))
    return prepared


def edit_by_variant(edits: Sequence[tuple[int, Edit]], samples: int, repeats: int) -> HookFunction:
    """One hook that applies to each variant of a batch, by index, its own edit; row `sample * repeats + variant`."""

    def edit(activation: Tensor, hook: HookPoint) -> Tensor:
        out = activation.clone()
        by_variant = out.unflatten(0, (samples, repeats))  # [row ...] -> [sample variant ...], a view
        for variant, change in edits:
            old = by_variant[:, variant]
            new = change(old, hook)
            if new is not None and new is not old:
                old.copy_(new)
        return out

    return edit

"""Activations of one run times gradients of another, gathered hook point by hook point during one backward pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, NumericsError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.objectives import BoundObjective, logits_at


@torch.no_grad()
def activations(
    model: Model, inputs: ResolvedInput, names: Sequence[str], positions: Int[Tensor, "batch n"]
) -> tuple[dict[str, Tensor], Float[Tensor, "batch n d_vocab"]]:
    """What some hook points hold in a run, and its logits at some positions."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept[hook.name] = x.clone()  # hooks of the user's may go on to edit it in place

    added = model.registry.attach(names, keep, reads_only=True)
    try:
        logits = logits_at(model, inputs, positions)
    finally:
        model.registry.detach(added)
    return kept, logits


def entrances(model: Model) -> list[str]:
    """The hook points where something enters the decoder blocks: the embeddings, and DeepStack's features."""
    return [name for name in model.hook_dict if name == "hook_embed" or name.endswith("hook_deepstack")]


@contextmanager
def between(model: Model, start: Mapping[str, Tensor], change: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Within it, what enters the decoder blocks is `start` and a share of the change."""

    def mix(x: Tensor, hook: HookPoint) -> Tensor:
        return start[hook.name] + share * change[hook.name]

    with model.hooks(fwd_hooks=[(name, mix) for name in entrances(model) if name in start]):
        yield


class Products:
    """Sums over an activation's width of gradients times something given, in float64.

    Args:
        model: A `HookedMLLM`, its parameters frozen.
        names: Hook points of the language model.
        inputs: What the model runs on.
        rows: Positions that count; padding never does.

    Attributes:
        sums: By hook point, `[batch pos]`, or `[batch pos head]` for a point of heads.
    """

    def __init__(
        self, model: Model, names: Sequence[str], inputs: ResolvedInput, rows: Bool[Tensor, "batch pos"]
    ) -> None:
        self.model, self.names, self.inputs, self.rows = model, names, inputs, rows
        self.sums: dict[str, Tensor] = {}

    def add(
        self,
        bound: BoundObjective,
        *,
        to: Mapping[str, Tensor] | None = None,
        change: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch n d_vocab"]:
        """One forward and one backward pass; returns the logits that the objective reads.

        Args:
            bound: The objective whose gradient is taken, summed over samples.
            to: Multiply gradients by how far these activations are from the run's own.
            change: Multiply gradients by these.

        Raises:
            HookValueError: for an objective that does not depend on the activations.
            NumericsError: for gradients that are not finite.
        """
        own: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: HookPoint) -> None:
            if to is not None:
                own[hook.name] = x.detach().clone()
            if hook.name not in self.sums:
                self.sums[hook.name] = torch.zeros(x.shape[:-1], dtype=torch.float64)

        def multiply(gradient: Tensor, hook: HookPoint) -> None:
            other = change[hook.name] if change is not None else _difference(to, own, hook.name)
            product = (gradient.double() * other.double()).sum(-1).cpu()
            if not bool(torch.isfinite(product[self.rows]).all()):
                raise NumericsError(
                    f"The gradient at {hook.name} is not finite: the model overflowed. Load it with dtype='bfloat16' "
                    "or 'float32'."
                )
            product[~self.rows] = 0.0  # what stands at padding is noise, and may be NaN
            self.sums[hook.name] += product

        registry = self.model.registry
        added = registry.attach(self.names, keep, reads_only=True)
        try:
            added += registry.attach(self.names, multiply, "bwd")
            with torch.enable_grad():
                logits = logits_at(self.model, self.inputs, bound.positions)
                value = bound(logits).sum()
                if not value.requires_grad:
                    raise HookValueError(
                        f"{bound.objective!r} has no gradient: its value does not depend on the logits."
                    )
                value.backward()
        finally:
            registry.detach(added)
        return logits.detach()


def _difference(to: Mapping[str, Tensor] | None, own: dict[str, Tensor], name: str) -> Tensor:
    assert to is not None
    mine = own.pop(name)
    return to[name].double() - mine.double()

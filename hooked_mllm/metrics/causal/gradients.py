"""Activations of one run times gradients of another, at each hook point."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

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
    """Activations of hook points in a run, and its logits at positions."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        kept[hook.name] = x.clone()  # a later hook may edit it in place

    with model.registry.attached(names, keep, reads_only=True):
        return kept, logits_at(model, inputs, positions)


def entrances(model: Model) -> list[str]:
    """The hook points of what enters the decoder blocks: the embeddings, and DeepStack's features."""
    return [name for name in model.hook_dict if name == "hook_embed" or name.endswith("hook_deepstack")]


@contextmanager
def between(model: Model, start: Mapping[str, Tensor], change: Mapping[str, Tensor], share: float) -> Iterator[None]:
    """Set what enters the decoder blocks to `start + share * change`."""

    def mix(x: Tensor, hook: HookPoint) -> Tensor:
        return start[hook.name] + share * change[hook.name]

    with model.hooks(fwd_hooks=[(name, mix) for name in entrances(model) if name in start]):
        yield


@dataclass
class Products:
    """Products of gradients and changes of activations, summed over the activation's width in float64.

    `sums` are `[batch pos]` by hook point, or `[batch pos head]` for a point of heads, and 0 outside `mask`.
    """

    model: Model
    names: Sequence[str]
    inputs: ResolvedInput
    mask: Bool[Tensor, "batch pos"]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self,
        bound: BoundObjective,
        *,
        to: Mapping[str, Tensor] | None = None,
        change: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch n d_vocab"]:
        """Add gradients times `change`, or times `to` minus the run's activations; returns the objective's logits."""
        own: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: HookPoint) -> None:
            if to is not None:
                own[hook.name] = x.detach().clone()
            if hook.name not in self.sums:
                self.sums[hook.name] = torch.zeros(x.shape[:-1], dtype=torch.float64)

        def multiply(gradient: Tensor, hook: HookPoint) -> None:
            if change is not None:
                difference = change[hook.name].double()
            else:
                assert to is not None
                difference = to[hook.name].double() - own.pop(hook.name).double()
            product = (gradient.double() * difference).sum(-1).cpu()  # [batch pos ... width] -> [batch pos ...]
            if not bool(torch.isfinite(product[self.mask]).all()):
                raise NumericsError(
                    f"The gradient at {hook.name} is not finite: the model overflowed. Load it with dtype='bfloat16' "
                    "or 'float32'."
                )
            product[~self.mask] = 0.0  # values at padding are meaningless, and may be NaN
            self.sums[hook.name] += product

        registry = self.model.registry
        keeping = registry.attached(self.names, keep, reads_only=True)
        with keeping, registry.attached(self.names, multiply, "bwd"), torch.enable_grad():
            logits = logits_at(self.model, self.inputs, bound.positions)
            value = bound(logits).sum()
            if not value.requires_grad:
                raise HookValueError(f"{bound.objective!r} has no gradient: its value does not depend on the logits.")
            value.backward()
        return logits.detach()

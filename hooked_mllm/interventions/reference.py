"""HeadReference: z of heads over a set of samples, which mean and resample ablation read."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.contracts import Model, Tower
from hooked_mllm.errors import HeadError, HookValueError, InputError
from hooked_mllm.heads import HeadSet, HeadsLike
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.inputs.resolve import ModelInputs, ResolvedInput, each_sample, no_sample
from hooked_mllm.interventions.base import heads_of, keep_heads, tower_shape
from hooked_mllm.interventions.edited_positions import check_edited_positions


@dataclass(frozen=True, eq=False)
class HeadReference:
    """z of heads over a set of samples; `HeadAblation.reference` makes one.

    Attributes:
        mean: Mean z of each head over all tokens of all samples; NaN for other heads than `heads`.
        heads: The heads that it has.
        n_tokens: Tokens in the mean.
        n_samples: Samples in it.
        tower: "text" or "vision".
        positions: Positions of each sample that were averaged, as a record keeps them; None for all.
        ids: Names of the samples, where they have some.
        tokens: z of every token by layer, `[token head d_head]` with heads in ascending order; empty unless kept.
    """

    mean: Float[Tensor, "layer head d_head"]
    heads: HeadSet
    n_tokens: int
    n_samples: int
    tower: str = "text"
    positions: Any = None
    ids: tuple[str | None, ...] = ()
    tokens: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def check(self, heads: HeadSet, tower: str) -> None:
        """Reject heads that it does not have.

        Args:
            heads: Heads to ablate.
            tower: Their tower.

        Raises:
            HeadError: for such heads, or those of another tower.
        """
        if self.tower != tower:
            raise HeadError(f"This reference is of the {self.tower} tower, the ablation of the {tower} tower.")
        missing = heads - self.heads
        if missing:
            raise HeadError(
                f"The reference has no {missing}: make it with "
                "HeadAblation.reference(model, samples, heads) for all heads that are ablated."
            )

    def describe(self) -> dict[str, Any]:
        """Its origin, as values that JSON can hold."""
        named = [i for i in self.ids if i is not None]
        facts = {"samples": self.n_samples, "tokens": self.n_tokens, "positions": self.positions}
        return {**facts, "ids": named} if named else facts


class _Sum:
    """Sums z of the heads over tokens, as a hook."""

    def __init__(self, heads: HeadSet, d_head: int, keep: bool) -> None:
        self.by_layer = heads.by_layer
        self.sums = {layer: torch.zeros(len(h), d_head, dtype=torch.float64) for layer, h in self.by_layer.items()}
        self.kept: dict[int, list[Tensor]] = {layer: [] for layer in self.by_layer}
        self.keep = keep
        self.counts = dict.fromkeys(self.by_layer, 0)
        #: positions of the present samples that are summed `[batch pos]`; None for all
        self.mask: Tensor | None = None

    def __call__(self, z: Tensor, hook: HookPoint) -> None:
        layer = hook.layer()
        z = z.detach()[:, :, list(self.by_layer[layer])]
        # [batch pos head d_head] -> [token head d_head]
        tokens = z.flatten(0, 1) if self.mask is None else z[self.mask.to(z.device)]
        self.sums[layer] += tokens.double().sum(0).cpu()
        self.counts[layer] += len(tokens)
        if self.keep:
            self.kept[layer].append(tokens.cpu())


@torch.no_grad()
def head_reference(
    model: Model,
    samples: ModelInputs,
    heads: HeadsLike,
    *,
    positions: Positions | None = None,
    tower: Tower = "text",
    keep_tokens: bool = False,
) -> HeadReference:
    """The body of `HeadAblation.reference`; arguments and errors are those listed there."""
    check_edited_positions(positions, "prefill", tower)
    if tower != "text" and positions is not None:
        raise HookValueError("A reference of the vision tower is over all of its positions: leave positions out.")
    head_set = heads_of(keep_heads(heads), model, tower)
    d_head = model.cfg.d_head if tower == "text" else model.cfg.vision_d_head
    total, ids = _Sum(head_set, d_head, keep_tokens), []
    prefix = "" if tower == "text" else f"{tower}."
    names = [f"{prefix}blocks.{layer}.attn.hook_z" for layer in head_set.by_layer]
    for sample in each_sample(samples):
        inputs = model.resolve(sample)
        total.mask = _averaged(inputs, positions) if tower == "text" else None
        added = model.registry.attach(names, total, reads_only=True)
        try:
            model.run_trunk(inputs)
        finally:
            model.registry.detach(added)
        ids += inputs.ids
    if not ids:
        raise no_sample("average z over")
    if not all(total.counts.values()):
        raise InputError(f"These samples have no positions in the {tower} tower: give samples with images.")
    mean = torch.full((*tower_shape(model, tower), d_head), float("nan"))
    for layer, inside in head_set.by_layer.items():
        mean[layer, list(inside)] = (total.sums[layer] / total.counts[layer]).float()
    tokens = {layer: torch.cat(parts) for layer, parts in total.kept.items()} if keep_tokens else {}
    count = next(iter(total.counts.values()))
    return HeadReference(mean, head_set, count, len(ids), tower, describe_positions(positions), tuple(ids), tokens)


def _averaged(inputs: ResolvedInput, selected: Positions | None) -> Bool[Tensor, "batch pos"]:
    real = ~inputs.padding
    return real if selected is None else real & inputs.mask(selected)

"""What heads give on a set of samples: the reference of mean and resample ablation."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.cache.activation_cache import Positions, positions
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HeadError, HookValueError, InputError
from hooked_mllm.heads import HeadSet
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.interventions.base import describe_positions, heads_of, keep_heads, tower_shape
from hooked_mllm.interventions.places import as_mask, check_places


@dataclass(frozen=True, eq=False)
class HeadReference:
    """What heads gave on a set of samples; `HeadAblation.reference` makes one.

    Attributes:
        mean: Mean z of each head over all tokens of all samples; NaN for heads that were not asked for.
        heads: The heads that were.
        n_tokens: Tokens in the mean.
        n_samples: Samples in it.
        tower: "text" or "vision".
        positions: Which positions of each sample, as a record keeps them; None for all.
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
        """Refuse to stand for heads that it does not know.

        Raises:
            HeadError: for such heads, or those of another tower.
        """
        if self.tower != tower:
            raise HeadError(f"This reference is of the {self.tower} tower, the ablation of the {tower} tower.")
        missing = heads - self.heads
        if missing:
            raise HeadError(
                f"The reference knows nothing of {missing}: make it with "
                "HeadAblation.reference(model, samples, heads) for all heads that are ablated."
            )

    def describe(self) -> dict[str, Any]:
        """Where it comes from, as values that JSON can hold."""
        named = [i for i in self.ids if i is not None]
        told = {"samples": self.n_samples, "tokens": self.n_tokens, "positions": self.positions}
        return {**told, "ids": named} if named else told


class _Sum:
    """Collects z of the chosen heads while the model runs."""

    def __init__(self, heads: HeadSet, d_head: int, keep: bool) -> None:
        self.by_layer = heads.by_layer
        self.sums = {layer: torch.zeros(len(h), d_head, dtype=torch.float64) for layer, h in self.by_layer.items()}
        self.kept: dict[int, list[Tensor]] = {layer: [] for layer in self.by_layer}
        self.keep = keep
        self.counts = dict.fromkeys(self.by_layer, 0)
        self.rows: Tensor | None = None

    def __call__(self, z: Tensor, hook: Any) -> None:
        layer = hook.layer()
        chosen = z.detach()[:, :, list(self.by_layer[layer])]
        flat = chosen.flatten(0, 1) if self.rows is None else chosen[self.rows.to(z.device)]
        self.sums[layer] += flat.double().sum(0).cpu()
        self.counts[layer] += len(flat)
        if self.keep:
            self.kept[layer].append(flat.cpu())


@torch.no_grad()
def head_reference(
    model: Model,
    samples: Any,
    heads: Any,
    *,
    positions: Positions | None = None,
    tower: str = "text",
    keep_tokens: bool = False,
) -> HeadReference:
    """The work of `HeadAblation.reference`."""
    check_places(positions, "prefill", tower)
    chosen = heads_of(keep_heads(heads), model, tower)
    n_layers, n_heads = tower_shape(model, tower)
    d_head = model.cfg.d_head if tower == "text" else model.cfg.vision_d_head
    total, ids = _Sum(chosen, d_head, keep_tokens), []
    prefix = "" if tower == "text" else f"{tower}."
    names = [f"{prefix}blocks.{layer}.attn.hook_z" for layer in chosen.by_layer]
    for sample in _each(samples):
        inputs = model.resolve(sample)
        total.rows = _rows(inputs, positions) if tower == "text" else None
        if tower != "text" and positions is not None:
            raise HookValueError("A reference of the vision tower is over all of its positions: leave positions out.")
        added = model.registry.attach(names, total, reads_only=True)
        try:
            model.run_trunk(inputs)
        finally:
            model.registry.detach(added)
        ids += inputs.ids
    if not ids:
        raise InputError("A reference needs at least one sample; the set given is empty.")
    if not all(total.counts.values()):
        raise InputError(f"These samples have no rows in the {tower} tower: give samples with images.")
    mean = torch.full((n_layers, n_heads, d_head), float("nan"))
    for layer, inside in chosen.by_layer.items():
        mean[layer, list(inside)] = (total.sums[layer] / total.counts[layer]).float()
    tokens = {layer: torch.cat(parts) for layer, parts in total.kept.items()} if keep_tokens else {}
    count = next(iter(total.counts.values()))
    return HeadReference(mean, chosen, count, len(ids), tower, describe_positions(positions), tuple(ids), tokens)


def _each(samples: Any) -> Iterable[Any]:
    return [samples] if isinstance(samples, Sample | SampleBatch) or hasattr(samples, "keys") else samples


def _rows(inputs: Any, wanted: Positions | None) -> Bool[Tensor, "batch pos"]:
    rows = ~inputs.masks("padding").cpu()
    return (
        rows
        if wanted is None
        else rows & as_mask(positions(wanted, inputs.batch, inputs.length, inputs.masks), inputs.length)
    )

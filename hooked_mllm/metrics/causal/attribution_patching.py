"""AttributionPatching: the effect of patching, estimated by gradients for all activations at once."""

from os import PathLike
from typing import Any, Unpack, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.cache.keys import full_name
from hooked_mllm.cache.run import frozen_parameters
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import Pairs
from hooked_mllm.errors import HookValueError, LayoutError
from hooked_mllm.heads import HeadScores
from hooked_mllm.inputs.positions import Positions
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.interventions.base import LayersLike
from hooked_mllm.metrics.causal.gradients import Products, activations, between, entrances
from hooked_mllm.metrics.causal.patching_effect import (
    HeadSite,
    PatchingEffect,
    PatchingOptions,
    Result,
    StreamSite,
    Unit,
    kinds_of,
)
from hooked_mllm.metrics.causal.swept import Direction, Job
from hooked_mllm.metrics.causal.table import CausalTable
from hooked_mllm.objectives.function import ObjectiveLike, as_objective


class Options(PatchingOptions, total=False):
    """Optional arguments of `AttributionPatching`; see there."""

    integrated: int | None


@checked
class AttributionPatching(PatchingEffect[Result]):
    r"""The effect of patching each activation, to first order: two forward passes and a backward pass for all heads.

    $$\mathrm{effect}_a \approx \frac{\sum_x \big\langle a_\text{source} - a_\text{base},\,
    \nabla_a m(\text{base})\big\rangle}{\sum_x m(\text{source}) - m(\text{base})}$$

    - $m$: the objective; $\langle\cdot,\cdot\rangle$: the sum over positions and the activation's width, in float64.
    - base and source: see `PatchingEffect`, whose effects these estimate, with the same signs.

    The estimate is linear: where attention or the objective is saturated, gradients of one run predict little of the
    other; compare with `PatchingEffect` on a few samples (`plots.scatter`). `integrated=n` takes the mean gradient at n
    points between the embeddings (also of images and DeepStack) of the two runs, at the middles of n equal steps, with
    n forward and backward passes. Then the values of all that enters the blocks add up to the whole difference, both
    directions have the same values, and each value is an activation's contribution while all activations change, not
    that of patching it alone.

    Differences from the sources: EAP scores edges between nodes, this metric nodes; EAP-IG uses the right ends of the
    steps, this metric their middles. Arguments that are not listed here are those of `PatchingEffect`.

    Args:
        site: As in `PatchingEffect`, without "pattern", whose gradients need N x N memory.
        integrated: Number of points between the runs, at least 1; None for the gradient of the base alone.

    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023 (arXiv:2310.10348); integrated: Hanna et al. 2024
    (arXiv:2403.17806).

    Examples:
        >>> from hooked_mllm import HeadSet, HookedMLLM, corruptions, metrics, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> task = toys.VisualRetrieval(pages=1)
        >>> pairs = [(s, corruptions.MeanRegion()(model, s)) for s in task.samples(model, 4, answer=True)]
        >>> objective = objectives.LogitDifference(wrong=task.answers)
        >>> scores = metrics.AttributionPatching().run(model, pairs, objective=objective, progress=False)
        >>> scores.top(3) == HeadSet(["L2H5", "L2H6", "L2H7"], n_layers=6, n_heads=8)
        True
    """

    doing = "attributing"

    @overload
    def __init__(self: "AttributionPatching[HeadScores]", site: HeadSite = "z", **options: Unpack[Options]) -> None: ...

    @overload
    def __init__(self: "AttributionPatching[CausalTable]", site: StreamSite, **options: Unpack[Options]) -> None: ...

    def __init__(
        self,
        site: str = "z",
        *,
        direction: Direction = "denoising",
        by: Unit | None = None,
        positions: Positions | None = None,
        layers: LayersLike | None = None,
        normalise: bool = True,
        integrated: int | None = None,
    ) -> None:
        if site == "pattern":
            raise HookValueError(
                "Gradients of patterns need N x N memory in every layer at once: use 'q', 'k' or 'z', or "
                "PatchingEffect('pattern')."
            )
        super().__init__(site, direction=direction, by=by, positions=positions, layers=layers, normalise=normalise)
        if integrated is not None and integrated < 1:
            raise HookValueError(f"integrated is a number of points, at least 1, or None; got {integrated}.")
        self.integrated = integrated

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        return {**super().config(), "integrated": self.integrated}

    def run(  # type: ignore[override]  # no variants are run, so that there is no batch size
        self,
        model: Model,
        pairs: Pairs,
        *,
        objective: ObjectiveLike,
        checkpoint: str | PathLike[str] | None = None,
        progress: bool = True,
    ) -> Result:
        """Estimate all effects; arguments and result are those of `PatchingEffect.run`.

        The source's activations of the site are kept in memory for all layers.

        Raises:
            HookValueError: For an objective without gradient, or with gradient zero in the base (KL, "noising").
            NumericsError: If gradients are not finite, or the two runs of all pairs have the same objective.
        """
        goal = as_objective(objective)
        if not goal.differentiable:
            raise HookValueError(f"{goal!r} has no gradient: use LogitDifference or AnswerLogProb, or PatchingEffect.")
        if goal.needs_clean and self.direction == "noising" and self.integrated is None:
            raise HookValueError(
                f"{goal!r} has its minimum in the clean run, where its gradient is zero: use direction='denoising' or "
                "integrated=4."
            )
        return super().run(model, pairs, objective=goal, checkpoint=checkpoint, progress=progress)

    def values(self, job: Job) -> None:
        """The estimates of a pair."""
        model, denoising = job.model, self.direction == "denoising"
        clean, corrupted = (model.resolve(sample) for sample in job.item)
        bound = job.goal.bind(model, clean, corrupted)
        base, source = self._base_and_source(clean, corrupted)
        mask = self._measured(base, source)
        names = [full_name((self.site, layer), {"text": model.cfg.n_layers}) for layer in self._layers(model)]
        recorded = [*names, *(entrances(model) if self.integrated else [])]
        products = Products(model, names, base, mask)
        with frozen_parameters(model):
            of_source, source_logits = activations(model, source, recorded, bound.positions)
            if self.integrated is None:
                bound = bound.with_clean(source_logits) if job.goal.needs_clean else bound
                base_logits = products.add(bound, to=of_source)
            else:
                of_base, base_logits = activations(model, base, recorded, bound.positions)
                clean_logits = source_logits if denoising else base_logits
                bound = bound.with_clean(clean_logits) if job.goal.needs_clean else bound
                change = {name: of_source.pop(name) - x for name, x in of_base.items()}
                for n in range(self.integrated):
                    with between(model, of_base, change, (n + 0.5) / self.integrated):
                        products.add(bound, change=change)
        runs = (source_logits, base_logits) if denoising else (base_logits, source_logits)  # clean, corrupted
        with torch.no_grad():
            job.runs[:] = torch.stack([bound(logits).double().cpu() for logits in runs]).numpy()
        sums = torch.stack([products.sums[name] for name in names]) / (self.integrated or 1)
        base_value = torch.from_numpy(job.runs[1 if denoising else 0])
        estimate = self._by_unit(sums, job).flatten(0, 1) + base_value  # [layer unit sample] -> [variant sample]
        job.store([*range(len(estimate))], estimate)

    def _measured(self, base: ResolvedInput, source: ResolvedInput) -> Bool[Tensor, "batch pos"]:
        """The selected positions, without padding."""
        if not torch.equal(base.padding, source.padding):
            raise LayoutError("The two batches of a pair are padded on different sides: pad both on the same side.")
        return ~base.padding if self.positions is None else base.mask(self.positions) & ~base.padding

    def _by_unit(self, products: Tensor, job: Job) -> Float[Tensor, "layer unit sample"]:
        """`[layer batch pos]`, or `[layer batch pos head]`, summed over the positions of each unit."""
        if self.by == "position":
            return products.transpose(1, 2)
        if self.by == "head":
            return products.sum(2).transpose(1, 2)
        if self.by == "layer":
            return products.sum(2)[:, None]
        masks = kinds_of(job.item[0])
        return torch.stack([products[..., masks[kind]].sum(-1) for kind in self._units(job.model, job.items)], dim=1)

"""AttributionPatching: what patching would do, read off a gradient, for every head or place at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.cache.keys import full_name
from hooked_mllm.cache.run import frozen_parameters
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, LayoutError
from hooked_mllm.inputs.positions import Positions
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.interventions.base import LayersLike
from hooked_mllm.metrics.causal.gradients import Products, activations, between, entrances
from hooked_mllm.metrics.causal.patching_effect import PatchingEffect, kinds_of
from hooked_mllm.metrics.causal.swept import Job
from hooked_mllm.objectives import as_objective


class AttributionPatching(PatchingEffect):
    r"""What patching each activation would do, by a first-order estimate: all heads for two forwards and a backward.

    $$\mathrm{effect}_a \approx \frac{\sum_x \big\langle a_\text{source} - a_\text{base},\,
    \nabla_a m(\text{base})\big\rangle}{\sum_x m(\text{source}) - m(\text{base})}$$

    - $m$: the objective; $\langle\cdot,\cdot\rangle$: the sum over positions and the activation's width, in float64.
    - base and source: see `PatchingEffect`, whose numbers these estimate, with the same signs and places.

    Straight lines miss curves: where attention or the objective is saturated, gradients of one run say little of the
    other. On the toys the plain estimate mostly ranks the z of heads as patching does, and misses what the evidence's
    tokens carry before they are read (see the manual). `integrated=n` takes the mean gradient at n points on the way
    from one run's embeddings to the other's (n forwards and backwards), at the middles of n equal steps; image
    embeddings and DeepStack's features move along. All that enters then adds up to the whole difference, both
    directions give the same numbers, and each is what an activation contributes while all of them change, which is not
    what patching it alone does. Compare with `PatchingEffect` on a few samples: `plots.scatter` draws one against the
    other.

    What the sources do differently: EAP scores edges between nodes, these are nodes; EAP-IG takes the right ends of
    the steps in place of their middles.

    Args:
        site: "z", "q", "k", "v", "rot_q", "rot_k" (heads); "resid_pre", "resid_mid", "resid_post", "attn_out",
            "mlp_out" (layers and places). Patterns are left out, whose gradients need N x N memory.
        direction: "denoising" or "noising".
        by: What is told apart; see `PatchingEffect`.
        positions: Only these positions, for "head" and "layer".
        layers: Only these layers.
        normalise: Divide by the whole difference of the two runs.
        integrated: Points on the way; None for the gradient of the base alone.

    Raises:
        HookValueError: for a site without such places, an unknown direction, or no point.

    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023 (arXiv:2310.10348); integrated: Hanna et al. 2024
    (arXiv:2403.17806).

    Examples:
        >>> from hooked_mllm import HeadSet, HookedMLLM, corruptions, metrics, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> task = toys.VisualRetrieval(pages=1)
        >>> clean = task.samples(model, 4, answer=True)
        >>> pairs = [(s, corruptions.MeanRegion()(model, s)) for s in clean]
        >>> scores = metrics.AttributionPatching().run(
        ...     model, pairs, objective=objectives.LogitDifference(wrong=task.answers), progress=False
        ... )
        >>> scores.top(3) == HeadSet(["L2H5", "L2H6", "L2H7"], n_layers=6, n_heads=8)
        True
    """

    doing = "attributing"

    def __init__(
        self,
        site: str = "z",
        *,
        direction: str = "denoising",
        by: str | None = None,
        positions: Positions | None = None,
        layers: LayersLike | None = None,
        normalise: bool = True,
        integrated: int | None = None,
    ) -> None:
        if site == "pattern":
            raise HookValueError(
                "Gradients of patterns need N x N memory in every layer at once: attribute 'q', 'k' or 'z', or patch "
                "patterns with PatchingEffect('pattern')."
            )
        super().__init__(site, direction=direction, by=by, positions=positions, layers=layers, normalise=normalise)
        if integrated is not None and integrated < 1:
            raise HookValueError(f"integrated is a number of points, at least 1, or None; got {integrated}.")
        self.integrated = integrated

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        return {**super().config(), "integrated": self.integrated}

    def run(  # type: ignore[override]  # nothing is run in variants here, so that none are batched
        self,
        model: Model,
        pairs: Any,
        *,
        objective: Any,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> Any:
        """Estimate the effect of every head, or of every layer at every place.

        Parameters get no gradients. The source's activations of the site are kept during the backward pass, in all
        layers.

        Args:
            model: A `HookedMLLM`.
            pairs: (clean sample, corrupted sample), or several; a corruption makes the second. Batches do as well.
            objective: A differentiable `Objective`, or a function of the last prompt position's logits; bound to the
                clean sample, and read at the same positions of either run.
            checkpoint: A file in which values are kept, so that an interrupted run goes on.
            progress: Show a progress bar.

        Returns:
            HeadScores for by="head" (query heads take the estimate of the key-value head that they read), else a
            CausalTable.

        Raises:
            HookValueError: for an objective without a gradient, or one that has none in the clean run (KL, "noising").
            LayoutError: for a pair of other token counts, naming both layouts.
            InputError: for no pair, or answers that the objective needs.
            NumericsError: when gradients are not finite, or the two runs of all pairs do not differ.
        """
        goal = as_objective(objective)
        if not goal.differentiable:
            raise HookValueError(f"{goal!r} has no gradient: take LogitDifference or AnswerLogProb, or PatchingEffect.")
        if goal.needs_clean and self.direction == "noising" and self.integrated is None:
            raise HookValueError(
                f"{goal!r} is at its least in the clean run, where its gradient is zero: take direction='denoising' or "
                "integrated=4."
            )
        return super().run(model, pairs, objective=goal, checkpoint=checkpoint, progress=progress)

    def values(self, job: Job) -> None:
        """The estimates of one pair."""
        model, forth = job.model, self.direction == "denoising"
        clean, corrupted = (model.resolve(one) for one in job.item)
        bound = job.goal.bind(model, clean, corrupted)
        base, source = (corrupted, clean) if forth else (clean, corrupted)
        rows = self._rows(base, source)
        names = [full_name((self.site, layer), {"text": model.cfg.n_layers}) for layer in self._layers(model)]
        seen = [*names, *(entrances(model) if self.integrated else [])]
        products = Products(model, names, base, rows)
        with frozen_parameters(model.hf_model):
            theirs, source_logits = activations(model, source, seen, bound.positions)
            if self.integrated is None:
                bound = bound.with_clean(source_logits) if job.goal.needs_clean else bound
                base_logits = products.add(bound, to=theirs)
            else:
                ours, base_logits = activations(model, base, seen, bound.positions)
                bound = bound.with_clean(source_logits if forth else base_logits) if job.goal.needs_clean else bound
                change = {name: theirs.pop(name) - own for name, own in ours.items()}
                for n in range(self.integrated):
                    with between(model, ours, change, (n + 0.5) / self.integrated):
                        products.add(bound, change=change)
        runs = (source_logits, base_logits) if forth else (base_logits, source_logits)
        with torch.no_grad():
            job.runs[:] = torch.stack([bound(logits).double().cpu() for logits in runs]).numpy()
        found = torch.stack([products.sums[name] for name in names]) / (self.integrated or 1)
        estimate = self._by_place(found, job).flatten(0, 1) + torch.from_numpy(job.runs[1 if forth else 0])
        job.store([*range(len(estimate))], estimate)

    def _rows(self, base: ResolvedInput, source: ResolvedInput) -> Bool[Tensor, "batch pos"]:
        padding = base.padding
        if not torch.equal(padding, source.padding):
            raise LayoutError("The two batches of a pair are padded on different sides: pad both alike.")
        if self.positions is None:
            return ~padding
        return base.mask(self.positions) & ~padding

    def _by_place(self, found: Tensor, job: Job) -> Float[Tensor, "layer place sample"]:
        """Products `[layer batch pos]`, or `[layer batch pos head]`, summed over the positions of each place."""
        if self.by == "position":
            return found.transpose(1, 2)
        if self.by == "head":
            return found.sum(2).transpose(1, 2)
        if self.by == "layer":
            return found.sum(2)[:, None]
        masks = kinds_of(job.item[0])
        return torch.stack([found[..., masks[kind]].sum(-1) for kind in self._places(job.model, job.items)], dim=1)

    def _result(self, model: Model, items: Sequence[Any], effect: np.ndarray, facts: dict[str, Any]) -> Any:
        result = super()._result(model, items, effect, facts)
        result.name = f"AttributionPatching({self.site})"
        return result

    def __repr__(self) -> str:
        return f"AttributionPatching({', '.join(f'{k}={v!r}' for k, v in self.config().items() if v is not None)})"

"""PatchingEffect: how far one activation of the other run carries its result over, for every head, layer or place."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_mllm.cache.keys import full_name
from hooked_mllm.cache.lazy import value_of
from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import as_pairs
from hooked_mllm.errors import HookNameError, HookValueError, InputError, NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.interventions import ActivationPatch
from hooked_mllm.interventions.base import LayersLike, check_choice, keep_layers, layers_of
from hooked_mllm.metrics.causal.swept import Job, SweptMetric
from hooked_mllm.metrics.causal.table import CausalTable
from hooked_mllm.storage import ready

#: sites of query heads, of key-value heads, and of the residual stream
QUERY_SITES, KEY_VALUE_SITES = ("z", "q", "rot_q", "pattern"), ("k", "v", "rot_k")
STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
#: the kinds of token that "kind" tells apart, if the samples have them
KINDS = ("target", "visual", "system", "template", "question", "answer")


class PatchingEffect(SweptMetric):
    r"""How far an activation of one run carries its result into the other: activation patching, one place at a time.

    $$\mathrm{effect}_a = \frac{\sum_x m(\text{base} \mid a \leftarrow \text{source}) - m(\text{base})}
    {\sum_x m(\text{source}) - m(\text{base})}$$

    - "denoising": the base is the corrupted run, the source the clean one. An effect of 1 restores the clean result:
      the activation is sufficient.
    - "noising": the base is the clean run, the source the corrupted one. An effect of 1 loses the clean result: the
      activation is necessary.

    Without `normalise`, the numerator is averaged over the pairs and signed so that "denoising" is positive where the
    clean result comes back and "noising" where it is lost.

    Args:
        site: "z", "q", "k", "v", "rot_q", "rot_k", "pattern" (heads); "resid_pre", "resid_mid", "resid_post",
            "attn_out", "mlp_out" (layers and places).
        direction: "denoising" or "noising".
        by: "head" for sites of heads; "position" (all pairs need one length), "kind" (of token: target, the other
            visual ones, system, template, question, answer) or "layer" for the others.
        positions: Only these positions, for "head" and "layer".
        layers: Only these layers.
        normalise: Divide by the whole difference of the two runs.

    Raises:
        HookValueError: for a site that has no such places, or an unknown direction.

    Source: Vig et al. 2020 (arXiv:2004.12265); Meng et al. 2022 (arXiv:2202.05262); Heimersheim and Nanda 2024
    (arXiv:2404.15255) on the two directions.

    Examples:
        >>> from hooked_mllm import HookedMLLM, corruptions, metrics, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-internvl")
        >>> clean = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> pair = (clean, corruptions.MeanRegion()(model, clean))
        >>> table = metrics.PatchingEffect("resid_pre", by="kind").run(
        ...     model, pair, objective=objectives.AnswerLogProb(), progress=False
        ... )
        >>> round(table[0, "target"], 3)
        1.0
    """

    doing = "patching"
    paired = True

    def __init__(
        self,
        site: str = "z",
        *,
        direction: str = "denoising",
        by: str | None = None,
        positions: Positions | None = None,
        layers: LayersLike | None = None,
        normalise: bool = True,
    ) -> None:
        check_choice("site", site, (*QUERY_SITES, *KEY_VALUE_SITES, *STREAM_SITES))
        check_choice("direction", direction, ("denoising", "noising"))
        heads = site not in STREAM_SITES
        by = by or ("head" if heads else "position")
        check_choice("by", by, ("head",) if heads else ("position", "kind", "layer"))
        if positions is not None:
            check_positions(positions)
        if positions is not None and by not in ("head", "layer"):
            raise HookValueError(
                f"`positions` go with by='head' or 'layer'; by={by!r} goes through the positions itself."
            )
        self.site, self.direction, self.by = site, direction, by
        self.layers = None if layers is None else keep_layers(layers)
        self.positions, self.normalise = positions, normalise

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        layers = self.layers if self.layers is None or isinstance(self.layers, int) else [*self.layers]
        plain = {"site": self.site, "direction": self.direction, "by": self.by, "normalise": self.normalise}
        return {**plain, "positions": describe_positions(self.positions), "layers": layers}

    def run(
        self,
        model: Model,
        pairs: Any,
        *,
        objective: Any,
        checkpoint: str | Path | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> Any:
        """Measure the effect of every head, or of every layer at every place.

        Args:
            model: A `HookedMLLM`.
            pairs: (clean sample, corrupted sample), or several; a corruption makes the second.
            objective: An `Objective`, or a function of the last prompt position's logits. It is bound to the clean
                sample, and read at the same positions of either run.
            checkpoint: A file in which values are kept; see `AblationEffect.run`.
            batch_size: Patches in a batch; None chooses by free memory.
            compile: See `Sweep`.
            progress: Show a progress bar.

        Returns:
            HeadScores for by="head" (of query heads: those of a key-value head share its effect), else a CausalTable.

        Raises:
            LayoutError: for a pair of other token counts, naming both layouts.
            InputError: for no pair, or answers that the objective needs.
            NumericsError: when the two runs of all pairs do not differ, so that nothing can be normalised.
        """
        ready(checkpoint)
        items = as_pairs(pairs)
        how = {"checkpoint": checkpoint, "batch_size": batch_size, "compile": compile, "progress": progress}
        (clean, corrupted), variants, facts = self.sweep(model, items, objective, **how)
        effect, more = normalised(clean, corrupted, variants, self.direction, self.normalise)
        return self._result(model, items, effect, {**facts, **more})

    def _result(self, model: Model, items: Sequence[Any], effect: np.ndarray, facts: dict[str, Any]) -> Any:
        layers, places = self._layers(model), self._places(model, items)
        grid, name = effect.reshape(len(layers), len(places)), f"PatchingEffect({self.site})"
        if self.by != "head":
            return CausalTable(grid, places=places, layers=layers, name=name, provenance=facts)
        values = np.full((model.cfg.n_layers, len(places)), np.nan)
        values[layers] = grid
        absent = sorted(set(range(model.cfg.n_layers)) - set(layers))
        counts = [0 if layer in absent else facts["n_samples"] for layer in range(model.cfg.n_layers)]
        scores = HeadScores(values, name=name, provenance=facts, counts=counts, missing=absent)
        return scores.to_query(model.cfg.n_heads) if self.site in KEY_VALUE_SITES else scores

    def _layers(self, model: Model) -> list[int]:
        count = model.cfg.n_layers
        return [*range(count)] if self.layers is None else layers_of(self.layers, count, "text")

    def _places(self, model: Model, items: Sequence[Any]) -> list[Any]:
        if self.by == "head":
            return [*range(model.cfg.n_key_value_heads if self.site in KEY_VALUE_SITES else model.cfg.n_heads)]
        if self.by == "layer":
            return ["all" if self.positions is None else str(describe_positions(self.positions))]
        if self.by == "position":
            lengths = sorted({model.resolve(clean).length for clean, _ in items})
            if len(lengths) > 1:
                raise InputError(
                    f"Position by position, all pairs need one length; they have {', '.join(map(str, lengths))} tokens."
                    " Use by='kind', or run the lengths apart."
                )
            return [*range(lengths[0])]
        found = [kinds_of(clean) for clean, _ in items]
        return [kind for kind in KINDS if all(kind in each for each in found)]

    def count(self, model: Model, items: Sequence[Any]) -> int:
        """Layers times places."""
        if self.by == "kind" and not all(isinstance(clean, Sample) for clean, _ in items):
            raise InputError("by='kind' takes pairs of Samples, not of batches: their kinds of token lie elsewhere.")
        name = full_name((self.site, 0), {"text": model.cfg.n_layers})
        if name not in model.hook_dict:
            raise HookNameError(f"{model.cfg.model_class} has no {self.site!r}: there is no hook point {name!r}.")
        return len(self._layers(model)) * len(self._places(model, items))

    def values(self, job: Job) -> None:
        """Every patch of one pair."""
        model, (clean, corrupted) = job.model, job.item
        resolved = model.resolve(clean), model.resolve(corrupted)
        bound, *runs = job.bound(*resolved)
        job.runs[:] = np.stack([r.numpy() for r in runs])
        base, source = (corrupted, clean) if self.direction == "denoising" else (clean, corrupted)
        activations = source_activations(model, source, self.site, self._layers(model))
        engine = job.engine(base, bound)
        where = kinds_of(clean) if self.by == "kind" else {}
        patches = [
            self._patch({layer: activations[layer]}, place, where)
            for layer in self._layers(model)
            for place in self._places(model, job.items)
        ]
        engine.run(patches, skip=job.known, done=job.store)

    def _patch(self, given: Mapping[int, Tensor], place: Any, where: Mapping[str, Tensor]) -> ActivationPatch:
        if self.by == "head":
            return ActivationPatch(self.site, given, heads=place, positions=self.positions)
        if self.by == "layer":
            return ActivationPatch(self.site, given, positions=self.positions)
        return ActivationPatch(self.site, given, positions=where.get(place, place))

    def __repr__(self) -> str:
        return f"PatchingEffect({', '.join(f'{k}={v!r}' for k, v in self.config().items() if v is not None)})"


def normalised(
    clean: np.ndarray, corrupted: np.ndarray, patched: np.ndarray, direction: str, normalise: bool
) -> tuple[np.ndarray, dict[str, float]]:
    """Effects `[variant]` of objectives `[sample]`, `[sample]` and `[variant sample]`, and the means of the two runs.

    Raises:
        NumericsError: when the two runs do not differ.
    """
    base, sign = (corrupted, 1.0) if direction == "denoising" else (clean, -1.0)
    change, whole = sign * (patched - base).sum(1), float((clean - corrupted).sum())
    means = {"clean": float(clean.mean()), "corrupted": float(corrupted.mean())}
    if not normalise:
        return change / len(clean), means
    if abs(whole) < 1e-9:
        raise NumericsError(
            "The clean and the corrupted runs have the same objective, so that effects cannot be a share of the "
            "difference: take a stronger corruption, another objective, or normalise=False."
        )
    return change / whole, means


def source_activations(model: Model, inputs: Any, site: str, layers: Sequence[int]) -> dict[int, Tensor]:
    """A site's activations in each layer of a run."""
    names = {layer: full_name((site, layer), {"text": model.cfg.n_layers}) for layer in layers}
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=[*names.values()], return_logits=False)
    return {layer: value_of(cache.entry(name)) for layer, name in names.items()}


def kinds_of(sample: Sample) -> dict[str, Tensor]:
    """Positions of each kind of token that a sample has; the target's are not among the other visual ones."""
    found: dict[str, Tensor] = {}
    target = sample.target_mask
    if target is not None:
        found["target"] = target
    for kind in KINDS[1:]:
        mask = sample.layout.mask(kind)
        if kind == "visual" and target is not None:
            mask = mask & ~target
        if bool(mask.any()):
            found[kind] = mask
    return found

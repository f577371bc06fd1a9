"""PatchingEffect: the effect of patching each head, position, kind of token or layer."""

from collections.abc import Sequence
from itertools import product
from os import PathLike
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar, Unpack, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.cache.keys import full_name
from hooked_mllm.cache.lazy import value_of
from hooked_mllm.cache.run import CacheRequest, cached_forward
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import Pairs
from hooked_mllm.errors import HookNameError, HookValueError, InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.hooks.table import KEY_VALUE_SITES, QUERY_SITES, STREAM_SITES
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions
from hooked_mllm.inputs.resolve import ModelInput
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.interventions import ActivationPatch
from hooked_mllm.interventions.base import LayersLike, check_choice, keep_layers
from hooked_mllm.metrics.causal.swept import Direction, Job, PairedMetric, SweepOptions
from hooked_mllm.metrics.causal.table import CausalTable
from hooked_mllm.objectives.function import ObjectiveLike

if TYPE_CHECKING:
    HeadSite = Literal["z", "q", "rot_q", "pattern", "k", "v", "rot_k"]
    StreamSite = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
    Unit = Literal["head", "position", "kind", "layer"]
else:
    HeadSite = StreamSite = Unit = str

#: the kinds of token of by="kind", where the samples have them
KINDS = ("target", "visual", "system", "template", "question", "answer")

#: HeadScores for sites of heads, CausalTable for those of the residual stream
Result = TypeVar("Result")


class PatchingOptions(TypedDict, total=False):
    """Optional arguments of `PatchingEffect`; see there."""

    direction: Direction
    by: Unit | None
    positions: Positions | None
    layers: LayersLike | None
    normalise: bool


@checked
class PatchingEffect(PairedMetric, Generic[Result]):
    r"""The effect of one activation of the source run on the base run: activation patching, one activation at a time.

    $$\mathrm{effect}_a = \frac{\sum_x m(\text{base} \mid a \leftarrow \text{source}) - m(\text{base})}
    {\sum_x m(\text{source}) - m(\text{base})}$$

    - "denoising": base: corrupted, source: clean. An effect of 1 restores the clean result: the activation suffices.
    - "noising": base: clean, source: corrupted. An effect of 1 loses the clean result: the activation is necessary.

    Without `normalise`, the numerator is averaged over the pairs, so that it is positive where a denoising patch makes
    the model better, or a noising one makes it worse: the sign is reversed if smaller is better, as for KL.

    Args:
        site: "z", "q", "k", "v", "rot_q", "rot_k", "pattern" (heads); "resid_pre", "resid_mid", "resid_post",
            "attn_out", "mlp_out" (residual stream).
        direction: "denoising" or "noising".
        by: What is patched at once: "head" for sites of heads; "position" (all pairs need one length), "kind" (of
            token: target, other visual tokens, system, template, question, answer) or "layer" for the others.
        positions: Only these positions, for "head" and "layer".
        layers: Only these layers.
        normalise: Divide by the difference of the two runs.

    Source: Vig et al. 2020 (arXiv:2004.12265); Meng et al. 2022 (arXiv:2202.05262); Heimersheim and Nanda 2024
    (arXiv:2404.15255) on the two directions.

    Examples:
        >>> from hooked_mllm import HookedMLLM, corruptions, metrics, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-internvl")
        >>> clean = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> pair = (clean, corruptions.MeanRegion()(model, clean))
        >>> effect = metrics.PatchingEffect("resid_pre", by="kind")
        >>> table = effect.run(model, pair, objective=objectives.AnswerLogProb(), progress=False)
        >>> round(table[0, "target"], 3)
        1.0
    """

    doing = "patching"

    @overload
    def __init__(
        self: "PatchingEffect[HeadScores]", site: HeadSite = "z", **options: Unpack[PatchingOptions]
    ) -> None: ...

    @overload
    def __init__(self: "PatchingEffect[CausalTable]", site: StreamSite, **options: Unpack[PatchingOptions]) -> None: ...

    @overload
    def __init__(self: "PatchingEffect[Any]", site: str, **options: Unpack[PatchingOptions]) -> None: ...

    def __init__(
        self,
        site: str = "z",
        *,
        direction: Direction = "denoising",
        by: Unit | None = None,
        positions: Positions | None = None,
        layers: LayersLike | None = None,
        normalise: bool = True,
    ) -> None:
        check_choice("site", site, (*QUERY_SITES, *KEY_VALUE_SITES, *STREAM_SITES))
        check_choice("direction", direction, ("denoising", "noising"))
        of_heads = site not in STREAM_SITES
        by = by or ("head" if of_heads else "position")
        check_choice("by", by, ("head",) if of_heads else ("position", "kind", "layer"))
        if positions is not None:
            check_positions(positions)
            if by not in ("head", "layer"):
                raise HookValueError(f"`positions` need by='head' or 'layer'; by={by!r} patches every position.")
        self.site, self.by, self.positions, self.normalise = site, by, positions, normalise
        self.direction = direction
        self.layers = None if layers is None else keep_layers(layers)

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        settings = {"site": self.site, "direction": self.direction, "by": self.by, "normalise": self.normalise}
        return {**settings, "positions": describe_positions(self.positions), "layers": self._layers_config()}

    def run(
        self,
        model: Model,
        pairs: Pairs,
        *,
        objective: ObjectiveLike,
        checkpoint: str | PathLike[str] | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> Result:
        """Measure all effects: HeadScores for by="head" (query heads share those of "k", "v"), else a CausalTable.

        Args:
            model: A `HookedMLLM`.
            pairs: (clean sample, corrupted sample) of one token layout, or several; a corruption makes the second.
            objective: An `Objective`, or a function of the last prompt position's logits; bound to the clean sample.
            checkpoint: A file for the values; see `AblationEffect.run`.
            batch_size: Patches in a batch; None: set by free memory.
            compile: See `Sweep`.
            progress: Show a progress bar.

        Raises:
            NumericsError: If the two runs of all pairs have the same objective, so that nothing can be normalised.
        """
        options = SweepOptions(checkpoint=checkpoint, batch_size=batch_size, compile=compile, progress=progress)
        items, effects, facts = self._effects(model, pairs, objective, options)
        layers, units = self._layers(model), self._units(model, items)
        grid = effects.reshape(len(layers), len(units))  # [layer * unit] -> [layer unit]
        name = f"{type(self).__name__}({self.site})"
        if self.by != "head":
            return cast("Result", CausalTable(grid, places=units, layers=layers, name=name, provenance=facts))
        scores = self._head_scores(model, layers, grid, facts, name)
        return cast("Result", scores.to_query(model.cfg.n_heads) if self.site in KEY_VALUE_SITES else scores)

    def _units(self, model: Model, items: Sequence[Any]) -> list[Any]:
        """Heads, positions, kinds of token, or one label of the whole layer."""
        if self.by == "head":
            return [*range(model.cfg.n_key_value_heads if self.site in KEY_VALUE_SITES else model.cfg.n_heads)]
        if self.by == "layer":
            return ["all" if self.positions is None else str(describe_positions(self.positions))]
        if self.by == "position":
            lengths = sorted({model.resolve(clean).length for clean, _ in items})
            if len(lengths) > 1:
                raise InputError(
                    f"by='position' needs pairs of one length; these have {', '.join(map(str, lengths))} tokens. Use "
                    "by='kind', or run each length separately."
                )
            return [*range(lengths[0])]
        kinds = [kinds_of(clean) for clean, _ in items]
        return [kind for kind in KINDS if all(kind in each for each in kinds)]

    def count(self, model: Model, items: Sequence[Any]) -> int:
        """Layers times heads, positions or kinds of token."""
        if self.by == "kind" and not all(isinstance(clean, Sample) for clean, _ in items):
            raise InputError("by='kind' takes pairs of Samples: in a batch, kinds have other positions in each sample.")
        name = full_name((self.site, 0), {"text": model.cfg.n_layers})
        if name not in model.hook_dict:
            raise HookNameError(f"{model.cfg.model_class} has no {self.site!r}: there is no hook point {name!r}.")
        return len(self._layers(model)) * len(self._units(model, items))

    def values(self, job: Job) -> None:
        """Every patch of one pair."""
        bound, model, layers = job.run_pair(), job.model, self._layers(job.model)
        base, source = self._base_and_source(*job.item)
        activations = source_activations(model, source, self.site, layers)
        masks = kinds_of(job.item[0]) if self.by == "kind" else {}
        patches = []
        for layer, unit in product(layers, self._units(model, job.items)):
            positions = self.positions if self.by in ("head", "layer") else masks.get(unit, unit)
            heads = unit if self.by == "head" else None
            patches.append(ActivationPatch(self.site, {layer: activations[layer]}, heads=heads, positions=positions))
        job.engine(base, bound).run(patches, skip=job.known, done=job.store)


def source_activations(
    model: Model, inputs: ModelInput, site: str, layers: Sequence[int]
) -> dict[int, Float[Tensor, "batch ..."]]:
    """The activations of a site in each layer of a run."""
    names = {layer: full_name((site, layer), {"text": model.cfg.n_layers}) for layer in layers}
    with torch.no_grad():
        request = CacheRequest(names_filter=[*names.values()], return_logits=False)
        _, cache = cached_forward(model, model.resolve(inputs), request)
    return {layer: value_of(cache.entry(name)) for layer, name in names.items()}


def kinds_of(sample: Sample) -> dict[str, Tensor]:
    """Positions `[pos]` of each kind of token of a sample; "visual" is without those of the target."""
    masks = {kind: sample.layout.mask(kind) for kind in KINDS[1:]}
    if sample.target_mask is not None:
        masks |= {"target": sample.target_mask, "visual": masks["visual"] & ~sample.target_mask}
    return {kind: mask for kind, mask in masks.items() if kind == "target" or bool(mask.any())}

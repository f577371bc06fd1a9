"""Patching: put activations of another run, or tensors, in place of a run's own."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from hooked_mllm.cache import ActivationCache
from hooked_mllm.cache.keys import full_name
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model, Tower
from hooked_mllm.errors import HeadError, HookNameError, HookValueError
from hooked_mllm.heads import HeadsLike, head_names
from hooked_mllm.heads.head_set import heads_by_layer
from hooked_mllm.hooks import HookPoint
from hooked_mllm.hooks.table import is_quadratic, spec_of, split_name
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.interventions.base import (
    Edit,
    LayersLike,
    check_choice,
    heads_of,
    keep_head_numbers,
    keep_heads,
    keep_layers,
    layer_list,
    layers_of,
    tower_shape,
)
from hooked_mllm.interventions.edited_positions import EditedPositions, PositionIntervention, check_edited_positions
from hooked_mllm.interventions.source import Source, SourceLike, source_of
from hooked_mllm.kernels.streaming_window import head_flags


@checked
class ActivationPatch(PositionIntervention):
    """Put activations of another run in place of this one's: the prompt's, in the prefill.

    Args:
        site: What to patch, in the names of the cache, such as "z", "pattern", "resid_post", "mlp_out", "deepstack"; or
            a whole hook name such as "vision.hook_out".
        source: The cache of another run; or a tensor, or a mapping of layers to tensors, in the activation's shape.
        layers: The layer or layers; None for all that the source holds.
        heads: Only these heads of a site that has them: numbers, the same in every layer, key-value heads for k, v and
            rot_k; or heads with their layer ("L2H4", a `HeadSet`, ...), which are then the layers that are patched.
        positions: Only these positions of the prompt (rows of a pattern): a token kind, a mask, indices, a slice.
        source_positions: Their positions in the source, in order; None for the same ones. With it the two runs may
            differ in length.
        tower: "text" or "vision", for a short site name.

    Raises:
        HookNameError: For a site or layer that the model, or the source, lacks.
        HeadError: For a head that the site lacks.
        HookValueError: For heads of a site without any; in a run, for a source of another shape.
        LayoutError: In a run, for a source with other positions.

    Examples:
        >>> from hooked_mllm import ActivationPatch, HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> clean, other = toys.VisualRetrieval(pages=1).samples(model, 2)
        >>> _, cache = model.run_with_cache(clean, "*hook_resid_post")
        >>> patch = ActivationPatch("resid_post", cache, layers=1, positions="visual")
        >>> with model.intervene(patch) as records:
        ...     logits = model(other)
        >>> records[0]["layers"], records[0]["applied"]["prefill"]
        ([1], 1)
    """

    def __init__(
        self,
        site: str,
        source: SourceLike,
        *,
        layers: LayersLike | None = None,
        heads: LayersLike | HeadsLike | None = None,
        positions: Positions | None = None,
        source_positions: Positions | None = None,
        tower: Tower = "text",
    ) -> None:
        whole = "." in site or site.startswith("hook_")
        if whole:
            tower = "vision" if site.startswith("vision.") else "text"  # the projector counts as the tower's end
        check_choice("tower", tower, ("text", "vision"))
        kind = "projector" if site.startswith("projector.") else tower
        check_edited_positions(positions, "prefill", "vision" if kind == "projector" else tower)
        self.site, self.whole, self.kind = site, whole, kind
        self.tower: Tower = tower
        self.source = source_of(source)
        self.layers = None if layers is None else keep_layers(layers)
        self.heads = None if heads is None else keep_head_numbers(heads)
        #: heads with their layer
        self.pairs = keep_heads(cast(HeadsLike, heads)) if heads is not None and self.heads is None else None
        if self.pairs is not None and layers is not None:
            raise HookValueError(f"The heads {', '.join(head_names(self.pairs))} have a layer: leave layers out.")
        if self.pairs is not None and not whole:
            self.layers = tuple(heads_by_layer(self.pairs))
        self.positions, self.source_positions = positions, source_positions
        if source_positions is not None and positions is None:
            raise HookValueError("source_positions= specifies the source position of each of `positions=`: give both.")
        if whole and layers is not None:
            raise HookValueError(f"{site!r} is the full name of one hook point: leave layers out, or shorten it.")

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        heads = None if self.heads is None else list(self.heads)
        if self.pairs is not None:
            heads = head_names(self.pairs)
        where = {"site": self.site, "layers": layer_list(self.layers), "heads": heads}
        return {"intervention": "ActivationPatch", **where, **_settings(self, self.kind)}

    def edits(self, model: Model) -> Iterator[tuple[str, Edit]]:
        """One edit at each hook point that is patched."""
        edited = EditedPositions(model, self.positions, "prefill", self.kind)
        for name, given in self._sources(model).items():
            source = Source(given, edited, self.source_positions)
            yield name, _patch(source, name, self._heads_at(name, model))

    def _sources(self, model: Model) -> dict[str, ActivationCache | Tensor]:
        """Hook points to patch, each with its source."""
        tensors: Mapping[Any, Tensor] = {} if isinstance(self.source, ActivationCache | Tensor) else self.source
        counts = {"text": model.cfg.n_layers, "vision": model.cfg.vision_n_layers}
        prefix = () if self.tower == "text" else (self.tower,)
        single = self.site if self.whole else ".".join((*prefix, f"hook_{self.site}"))
        if self.whole or single in model.hook_dict:
            model.registry[single]
            if self.layers is not None:
                raise HookValueError(f"{self.site!r} belongs to no layer: leave layers out.")
            if tensors and self.site not in tensors:
                raise HookNameError(f"The source holds {', '.join(map(str, tensors))}, not {self.site!r}.")
            names = {single: self.site}
        else:
            by_layer = {l: full_name((*prefix, self.site, l), counts) for l in range(counts[self.tower])}
            names = {by_layer[l]: l for l in self._selected_layers(tensors, by_layer)}
        for name in names:
            model.registry[name]
            if isinstance(self.source, ActivationCache):
                self.source.entry(name)  # raises now if the source does not contain it
        if isinstance(self.source, Tensor) and len(names) > 1:
            raise HookValueError(
                f"One tensor cannot be {len(names)} activations: give layers={{layer: tensor}} or one."
            )
        whole = self.source if isinstance(self.source, ActivationCache | Tensor) else None
        return {name: tensors[key] if whole is None else whole for name, key in names.items()}

    def _selected_layers(self, tensors: Mapping[Any, Tensor], names: dict[int, str]) -> list[int]:
        if isinstance(self.source, dict) and not tensors:
            raise HookValueError("The source is empty: it contains no activation.")
        if self.layers is not None or tensors:
            layers = layers_of(tensors if self.layers is None else self.layers, len(names), self.tower)
            if tensors and set(layers) - set(tensors):
                raise HookNameError(f"The source contains layers {sorted(tensors)}; `layers` selects {layers}.")
            return layers
        if isinstance(self.source, Tensor):
            raise HookValueError(f"Specify the layer= of {self.site!r} that this tensor is for: layers=3, for example.")
        layers = [layer for layer, name in names.items() if name in self.source]
        if not layers:
            raise HookNameError(f"The cache of the patch holds no {self.site!r} of the {self.tower} tower.")
        return layers

    def _heads_at(self, name: str, model: Model) -> tuple[int, ...] | None:
        if self.heads is None and self.pairs is None:
            return None
        spec = spec_of(name)
        if spec is None or not spec.has_heads:
            raise HookValueError(f"{name} has no heads to choose from: leave heads out.")
        n_heads, what = tower_shape(model, self.tower)[1], "heads"
        if self.tower == "text" and spec.has_key_value_heads:
            n_heads, what = model.cfg.n_key_value_heads, "key-value heads"
        heads, layer = self.heads, split_name(name)[1]
        if self.pairs is not None:
            pairs = self.pairs if spec.has_key_value_heads else heads_of(self.pairs, model, self.tower)
            heads = heads_by_layer(pairs).get(-1 if layer is None else layer)
            if heads is None:
                raise HeadError(f"{name} is in no layer of the heads {', '.join(head_names(pairs))}.")
        for head in heads or ():
            if not 0 <= head < n_heads:
                raise HeadError(f"Head {head} is not there: {name} has {what} 0 to {n_heads - 1}.")
        return heads


@checked
class HeadPatch(PositionIntervention):
    """Put z of heads in another run in place of their z in this one.

    Args:
        heads: "L20H15, L3H2", a pair (20, 15), a `HeadSet`, a boolean mask `[layer head]`, or a list of these.
        source: The cache of another run, with z of their layers; or a mapping of layers to `[batch pos head d_head]`,
            or one such tensor where all heads are in one layer.
        positions: Only these positions of the prompt.
        source_positions: Their positions in the source, in order; None for the same ones.
        tower: "text" or "vision".

    Raises:
        HeadError: For an empty set of heads, or a head that the model lacks.
        HookNameError: For a source without z of one of the layers.
        HookValueError, LayoutError: In a run, for a source of another shape or with other positions.

    Examples:
        >>> from hooked_mllm import HeadPatch, HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> clean, other = toys.VisualRetrieval(pages=1).samples(model, 2)
        >>> _, cache = model.run_with_cache(clean, "*hook_z")
        >>> with model.intervene(HeadPatch(["L2H4", "L2H5"], cache, positions="last", source_positions="last")):
        ...     logits = model(other)
    """

    def __init__(
        self,
        heads: HeadsLike,
        source: SourceLike,
        *,
        positions: Positions | None = None,
        source_positions: Positions | None = None,
        tower: Tower = "text",
    ) -> None:
        check_edited_positions(positions, "prefill", tower)
        self.heads, self.source = keep_heads(heads), source_of(source)
        self.positions, self.source_positions = positions, source_positions
        self.tower: Tower = tower
        self._layer(0, (0,))  # raises for positions that contradict each other

    def _layer(self, layer: int, heads: tuple[int, ...]) -> ActivationPatch:
        positions: dict[str, Any] = {"positions": self.positions, "source_positions": self.source_positions}
        return ActivationPatch("z", self.source, layers=layer, heads=heads, tower=self.tower, **positions)

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        return {"intervention": "HeadPatch", "heads": head_names(self.heads), **_settings(self, self.tower)}

    def edits(self, model: Model) -> Iterator[tuple[str, Edit]]:
        """One edit of z in each layer that has heads of the set."""
        by_layer = heads_of(self.heads, model, self.tower).by_layer
        if isinstance(self.source, Tensor) and len(by_layer) > 1:
            raise HookValueError(f"One tensor cannot be z of {len(by_layer)} layers: give a mapping {{layer: tensor}}.")
        for layer, inside in by_layer.items():
            yield from self._layer(layer, inside).edits(model)


def _patch(source: Source, name: str, heads: tuple[int, ...] | None) -> Edit:
    square = is_quadratic(name)  # [batch head query key]; other sites with heads are [batch pos head ...]
    axis = 2 if square else 1

    def edit(x: Tensor, hook: HookPoint) -> Tensor | None:
        mask = source.edited.mask(x.shape[0], x.shape[axis], hook, x.device)
        if mask is None or not bool(mask.any()):
            return None
        value = source.fit(name, x, mask, axis)
        # [batch pos] -> [batch 1 query 1] or [batch pos 1 ...], and [head] -> [head 1 1] or [head 1 ...]
        patched = mask[:, None, :, None] if square else mask.view(*mask.shape, *[1] * (x.dim() - 2))
        if heads is not None:
            flags = head_flags(heads, x.shape[1 if square else 2], x.device)
            patched = patched & (flags[:, None, None] if square else flags.view(-1, *[1] * (x.dim() - 3)))
        return torch.where(patched, value, x)

    return edit


def _settings(patch: ActivationPatch | HeadPatch, tower: str) -> dict[str, Any]:
    """The settings of both kinds of patch, as a record keeps them."""
    source = patch.source
    if isinstance(source, ActivationCache):
        described: Any = "the cache of another run"
    elif isinstance(source, Tensor):
        described = f"a tensor {tuple(source.shape)}"
    else:
        described = {str(name): f"a tensor {tuple(value.shape)}" for name, value in source.items()}
    settings = {"positions": describe_positions(patch.positions), "source": described, "tower": tower}
    moved = {"source_positions": describe_positions(patch.source_positions)}
    return {**settings, "phase": "prefill", **({} if patch.source_positions is None else moved)}

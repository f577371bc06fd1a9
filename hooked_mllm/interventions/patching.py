"""Patching: put activations of another run, or tensors, in place of a run's own."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_mllm.cache import ActivationCache
from hooked_mllm.cache.keys import full_name
from hooked_mllm.contracts import Model, Tower
from hooked_mllm.errors import HeadError, HookNameError, HookValueError
from hooked_mllm.heads import HeadsLike, head_names
from hooked_mllm.hooks import HookPoint
from hooked_mllm.hooks.table import is_quadratic, spec_of
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.interventions.base import (
    Edit,
    Intervention,
    LayersLike,
    check_choice,
    heads_of,
    keep_head_numbers,
    keep_heads,
    keep_layers,
    layers_of,
    tower_shape,
)
from hooked_mllm.interventions.edited_positions import EditedPositions, check_edited_positions, first_edited
from hooked_mllm.interventions.source import Source, source_of
from hooked_mllm.kernels.streaming_window import head_flags


class ActivationPatch(Intervention):
    """Put activations of another run in place of this one's: the prompt's, in the prefill.

    Args:
        site: What to patch, in the names of the cache: "z", "q", "k", "v", "pattern", "resid_pre", "resid_mid",
            "resid_post", "attn_out", "mlp_out", "post", "deepstack", "embed", ...; or a whole hook name such as
            "vision.hook_out".
        source: The cache of another run; or a tensor, or a mapping of layers to tensors, in the activation's shape.
        layers: The layer or layers; None for all that the source holds.
        heads: Only these heads of a site that has them; key-value heads for k, v and rot_k.
        positions: Only these positions of the prompt (rows of a pattern): a token kind, a mask, indices, a slice.
        source_positions: Which positions of the source they take, in order; None for the same ones. With it the two
            runs may differ in length.
        tower: "text" or "vision", for a short site name.

    Raises:
        HookNameError: for a site or layer that the model, or the source, lacks.
        HeadError: for a head that the site lacks.
        HookValueError: for heads of a site without any; in a run, for a source of another shape.
        LayoutError: in a run, for a source with other positions.

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
        source: Any,
        *,
        layers: LayersLike | None = None,
        heads: LayersLike | None = None,
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
        self.given = source_of(source)
        self.layers = None if layers is None else keep_layers(layers)
        self.heads = None if heads is None else keep_head_numbers(heads)
        self.positions, self.source_positions = positions, source_positions
        if source_positions is not None and positions is None:
            raise HookValueError("source_positions= specifies the source position of each of `positions=`: give both.")
        if whole and layers is not None:
            raise HookValueError(f"{site!r} is the full name of one hook point: leave layers out, or shorten it.")

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        layers = self.layers
        settings = {
            "intervention": "ActivationPatch",
            "site": self.site,
            "layers": [layers] if isinstance(layers, int) else None if layers is None else list(layers),
            "heads": None if self.heads is None else list(self.heads),
            "positions": describe_positions(self.positions),
            "source": _described(self.given),
            "tower": self.kind,
            "phase": "prefill",
        }
        if self.source_positions is not None:
            settings["source_positions"] = describe_positions(self.source_positions)
        return settings

    def first_position(self, model: Model, inputs: ResolvedInput) -> int:
        """The first position of the prompt whose row it may change; see `Intervention.first_position`."""
        return first_edited(self.positions, inputs) if self.tower == "text" else 0

    def edits(self, model: Model) -> Iterator[tuple[str, Edit]]:
        """One edit at each hook point that is patched."""
        names = self._names(model)
        edited = EditedPositions(model, self.positions, "prefill", self.kind)
        for name in names:
            given = self.given
            if isinstance(given, Mapping) and not isinstance(given, ActivationCache):
                given = {name: names[name]}
            source = Source(given, edited, self.source_positions)
            yield name, _patch(source, name, self._heads_at(name, model))

    def _names(self, model: Model) -> dict[str, Any]:
        """Hook points to patch, each with the tensor that a mapping gives for it."""
        given = self.given
        tensors: dict[Any, Any] = {}
        if isinstance(given, Mapping) and not isinstance(given, ActivationCache):
            tensors = dict(given)
        counts = {"text": model.cfg.n_layers, "vision": model.cfg.vision_n_layers}
        count = counts[self.tower]
        if self.whole:
            model.registry[self.site]
            found = {self.site: tensors.get(self.site)}
            if tensors and self.site not in tensors:
                raise HookNameError(f"The source holds {', '.join(map(str, tensors))}, not {self.site!r}.")
        else:
            prefix = () if self.tower == "text" else (self.tower,)
            alone = f"{self.tower}.hook_{self.site}" if prefix else f"hook_{self.site}"
            if alone in model.hook_dict:
                if self.layers is not None:
                    raise HookValueError(f"{self.site!r} belongs to no layer: leave layers out.")
                found = {alone: tensors.get(self.site)}
            else:
                layers = self._selected_layers(tensors, count, prefix, counts)
                found = {full_name((*prefix, self.site, l), counts): tensors.get(l) for l in layers}
        for name in found:
            model.registry[name]
            if isinstance(given, ActivationCache):
                given.entry(name)  # raises now if the source does not contain it
        if isinstance(given, Tensor) and len(found) > 1:
            raise HookValueError(
                f"One tensor cannot be {len(found)} activations: give layers={{layer: tensor}} or one."
            )
        return found

    def _selected_layers(
        self, tensors: dict[Any, Any], count: int, prefix: tuple[str, ...], counts: dict[str, int]
    ) -> list[int]:
        if self.layers is not None:
            layers = layers_of(self.layers, count, self.tower)
            if tensors and set(layers) - set(tensors):
                raise HookNameError(f"The source contains layers {sorted(tensors)}; `layers` selects {layers}.")
            return layers
        if tensors:
            return layers_of(tensors, count, self.tower)
        if isinstance(self.given, Tensor):
            raise HookValueError(f"Say the layer= of {self.site!r} that this tensor is for: layers=3, for example.")
        held = [l for l in range(count) if full_name((*prefix, self.site, l), counts) in self.given]
        if not held:
            raise HookNameError(
                f"The cache that the patch comes from holds no {self.site!r} of the {self.tower} tower."
            )
        return held

    def _heads_at(self, name: str, model: Model) -> tuple[int, ...] | None:
        if self.heads is None:
            return None
        spec = spec_of(name)
        if spec is None or not spec.has_heads:
            raise HookValueError(f"{name} has no heads to choose from: leave heads out.")
        _, n_heads = tower_shape(model, self.tower)
        few = self.tower == "text" and spec.has_key_value_heads
        n_heads, what = (model.cfg.n_key_value_heads, "key-value heads") if few else (n_heads, "heads")
        for head in self.heads:
            if not 0 <= head < n_heads:
                raise HeadError(f"Head {head} is not there: {name} has {what} 0 to {n_heads - 1}.")
        return self.heads


class HeadPatch(Intervention):
    """Put the z that heads gave in another run in place of the one that they give in this.

    Args:
        heads: "L20H15", "L20H15, L3H2", a pair (20, 15), a `HeadSet`, a boolean mask `[layer head]`, or a list of
            these.
        source: The cache of another run, with z of their layers; or a mapping of layers to `[batch pos head d_head]`,
            or one such tensor where all heads are in one layer.
        positions: Only these positions of the prompt.
        source_positions: Which positions of the source they take, in order; None for the same ones.
        tower: "text" or "vision".

    Raises:
        HeadError: for an empty set of heads, or a head that the model lacks.
        HookNameError: for a source without z of one of the layers.
        HookValueError, LayoutError: in a run, for a source of another shape or with other positions.

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
        source: Any,
        *,
        positions: Positions | None = None,
        source_positions: Positions | None = None,
        tower: Tower = "text",
    ) -> None:
        check_edited_positions(positions, "prefill", tower)
        self.heads, self.given = keep_heads(heads), source_of(source)
        self.positions, self.source_positions = positions, source_positions
        self.tower: Tower = tower
        self._layer(0, (0,))  # raises for positions that contradict each other

    def _layer(self, layer: int, heads: tuple[int, ...]) -> ActivationPatch:
        return ActivationPatch(
            "z",
            self.given,
            layers=layer,
            heads=heads,
            positions=self.positions,
            source_positions=self.source_positions,
            tower=self.tower,
        )

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        settings = {
            "intervention": "HeadPatch",
            "heads": head_names(self.heads),
            "positions": describe_positions(self.positions),
            "source": _described(self.given),
            "tower": self.tower,
            "phase": "prefill",
        }
        if self.source_positions is not None:
            settings["source_positions"] = describe_positions(self.source_positions)
        return settings

    def first_position(self, model: Model, inputs: ResolvedInput) -> int:
        """The first position of the prompt whose row it may change; see `Intervention.first_position`."""
        return first_edited(self.positions, inputs) if self.tower == "text" else 0

    def edits(self, model: Model) -> Iterator[tuple[str, Edit]]:
        """One edit of z in each layer that has heads of the set."""
        by_layer = heads_of(self.heads, model, self.tower).by_layer
        if isinstance(self.given, Tensor) and len(by_layer) > 1:
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
        chosen = mask.view(*mask.shape, *[1] * (x.dim() - 2)) if axis == 1 else mask[:, None, :, None]
        if heads is not None:
            flags = head_flags(heads, x.shape[1 if square else 2], x.device)
            chosen = chosen & (flags[:, None, None] if square else flags.view(-1, *[1] * (x.dim() - 3)))
        return torch.where(chosen, value, x)

    return edit


def _described(given: Any) -> Any:
    if isinstance(given, ActivationCache):
        return "the cache of another run"
    if isinstance(given, Tensor):
        return f"a tensor {tuple(given.shape)}"
    return {str(name): f"a tensor {tuple(value.shape)}" for name, value in given.items()}

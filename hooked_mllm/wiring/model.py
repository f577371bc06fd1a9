"""Joins all hook points of a model of any family to its modules."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mllm.attention.backends import TowerSwitch
from hooked_mllm.attention.site import AttentionSite
from hooked_mllm.errors import HookValueError, UnsupportedModelError
from hooked_mllm.families.base import Family, TowerParts
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.module_hook import ModuleHook as Junction
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import HookRegistry
from hooked_mllm.wiring import norms
from hooked_mllm.wiring.blocks import BlockWiring
from hooked_mllm.wiring.builder import Builder


@dataclass
class Wiring:
    """A model's hook points and attention sites.

    Attributes:
        registry: All hook points by name.
        family: The family by which the model was wired.
        text: Attention sites of the language model, one a block.
        vision: Attention sites of the vision tower, one a block.
        switches: The attention switches, by tower.
        outputs: Output projections, by the name of the z that they take.
    """

    registry: HookRegistry
    family: Family
    text: list[AttentionSite] = field(default_factory=list)
    vision: list[AttentionSite] = field(default_factory=list)
    switches: dict[str, TowerSwitch] = field(default_factory=dict)
    outputs: dict[str, nn.Module] = field(default_factory=dict)
    #: attention of blocks that run, but whose output goes nowhere: without hook points, as an edit there would be lost
    bystanders: list[AttentionSite] = field(default_factory=list)
    _deepstack: "DeepStack | None" = None

    @property
    def deepstack(self) -> "DeepStack":
        """The visual features that are added between the first blocks, where the family has such."""
        assert self._deepstack is not None
        return self._deepstack

    def add(self, sites: list[AttentionSite], block: BlockWiring) -> None:
        """Wire a block into one of the towers."""
        site = block.wire()
        sites.append(site)
        self.outputs[site.points["z"].name] = block.module(block.parts.o)

    def output_projection(self, site: AttentionSite) -> nn.Module:
        """The module that maps z to the residual stream (W_O and its bias)."""
        return self.outputs[site.points["z"].name]


class DeepStack:
    """The visual features that Qwen3-VL adds after its first decoder blocks, outside any module.

    The list of features is an argument of the language model and is read after each block: a point replaces its entry
    just before that.
    """

    def __init__(self, builder: Builder, language_model: nn.Module) -> None:
        self.features: list[Tensor] | None = None
        self.mask: Tensor | None = None
        self.builder = builder
        self.points: list[HookPoint] = []
        builder.junction(language_model, "pre").watch(self._enter, self.points)
        builder.junction(language_model, "post").watch(self._leave, self.points)

    @contextmanager
    def holding(self, features: list[Tensor], mask: Tensor | None) -> Iterator[list[Tensor]]:
        """Within it, blocks that are run by themselves find these features, and hooks replace them in the list."""
        before = self.features, self.mask
        self.features, self.mask = features or None, mask
        try:
            yield features
        finally:
            self.features, self.mask = before

    def bind(self, layer: int, block: nn.Module) -> None:
        """Make the point after one decoder block."""
        point = self.builder.point(f"blocks.{layer}.hook_deepstack", tower="text", block=layer)
        self.points.append(point)
        self.builder.junction(block, "post").bind(
            point, lambda call: self._get(call, layer), lambda call, x: self._put(x, layer)
        )

    def _enter(self, call: Call) -> None:
        features = call.kwargs.get("deepstack_visual_embeds")
        self.features = None if features is None else list(features)
        self.mask = call.kwargs.get("visual_pos_masks")
        if self.features is not None:
            call.kwargs = {**call.kwargs, "deepstack_visual_embeds": self.features}
            call.touched = True

    def _leave(self, call: Call) -> None:
        self.features = self.mask = None

    def _get(self, call: Call, layer: int) -> Tensor | None:
        if self.features is None or self.mask is None or layer >= len(self.features):
            return None  # a step without images: nothing is added
        hidden = call.main()
        dense = torch.zeros_like(hidden)
        mask = self.mask.to(hidden.device)
        dense[mask] = self.features[layer].to(hidden.device, hidden.dtype)
        return dense

    def _put(self, value: Tensor, layer: int) -> None:
        assert self.features is not None and self.mask is not None
        mask = self.mask.to(value.device)
        if bool((value[~mask] != 0).any()):
            raise HookValueError(
                f"A hook on blocks.{layer}.hook_deepstack wrote to positions that hold no visual token. DeepStack "
                f"adds to visual positions alone: edit blocks.{layer}.hook_resid_post or "
                f"blocks.{layer + 1}.hook_resid_pre for others."
            )
        self.features[layer] = value[mask]


#: the wiring of each wrapped model
WIRED: "weakref.WeakKeyDictionary[nn.Module, weakref.ReferenceType[Wiring]]" = weakref.WeakKeyDictionary()


def wire(model: nn.Module | Any, family: Family) -> Wiring:
    """Make every hook point of `model` and bind it to its module; nothing of the model is changed.

    Hook points belong to the model: wrapped again while an earlier wrapper lives, it gets the same ones.

    Args:
        model: A transformers model of one of the family's classes.
        family: Which module plays which part.

    Raises:
        UnsupportedModelError: when the model lacks one of them.
    """
    known = WIRED.get(model)
    wiring = None if known is None else known()
    if wiring is not None and wiring.family is family:
        return wiring
    registry = HookRegistry(type(model).__name__)
    builder = Builder(registry)
    wiring = Wiring(registry, family)
    try:
        _vision(model, family, builder, wiring)
        _text(model, family, builder, wiring)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks a part that the family {family.name!r} names: {error} This version of "
            "transformers may build the model in another way than this package knows."
        ) from error
    builder.finish()
    # weak: a hook may hold the wrapper, and a junction in use is held by its module
    junctions = [weakref.ref(j) for j in builder.junctions.values()]
    weakref.finalize(wiring, _let_go, junctions, list(wiring.switches.values()))
    WIRED[model] = weakref.ref(wiring)
    return wiring


def _let_go(junctions: list[weakref.ReferenceType[Junction]], switches: list[TowerSwitch]) -> None:
    """Leave the model as it was, also when its wrapper is dropped with hooks on it."""
    for reference in junctions:
        junction = reference()
        if junction is not None:
            junction.detach()
    for switch in switches:
        switch.release()


def _vision(model: Any, family: Family, builder: Builder, wiring: Wiring) -> None:
    config = family.vision_config(model.config)
    n_heads = family.vision_heads(model.config)
    switch = wiring.switches["vision"] = TowerSwitch(config, family.vision.packed)
    builder.junction(model.get_submodule(family.patch_embed), "post").bind(
        builder.point("vision.hook_patch_embed", tower="vision"),
        lambda call: family.patch_embed_value(call.main()),
        lambda call, x: call.set_main(family.patch_embed_output(x, call.main())),
    )
    depth = family.vision_depth(model)
    for index, block in enumerate(model.get_submodule(family.vision.blocks)):
        block_wiring = BlockWiring(
            builder, block, family.vision, "vision.", index, n_heads, config.hidden_size // n_heads, switch
        )
        if index < depth:
            wiring.add(wiring.vision, block_wiring)
        else:
            wiring.bystanders.append(block_wiring.bystander())
    path, side = family.vision_out_module()
    point = builder.point("vision.hook_out", tower="vision")
    if side == "input":
        builder.junction(model.get_submodule(path), "pre").bind(
            point,
            lambda call: family.vision_out_value(call.first(), model),
            lambda call, x: call.set_first(family.vision_out_replace(x, call.first(), model)),
        )
    else:
        builder.junction(model.get_submodule(path), "post").bind(
            point,
            lambda call: family.vision_out_value(call.output, model),
            lambda call, x: call.set_main(family.vision_out_replace(x, call.output, model)),
        )
    _through(builder, model.get_submodule(family.projector), "projector", family.vision)


def _through(builder: Builder, module: nn.Module, name: str, tower: TowerParts) -> None:
    def lift(x: Tensor) -> Tensor:
        return x[None] if tower.packed else x

    def drop(x: Tensor) -> Tensor:
        return x[0] if tower.packed else x

    builder.junction(module, "pre").bind(
        builder.point(f"{name}.hook_in", tower=name), lambda c: lift(c.first()), lambda c, x: c.set_first(drop(x))
    )
    builder.junction(module, "post").bind(
        builder.point(f"{name}.hook_out", tower=name), lambda c: lift(c.main()), lambda c, x: c.set_main(drop(x))
    )


def _text(model: Any, family: Family, builder: Builder, wiring: Wiring) -> None:
    config = family.text_config(model.config)
    switch = wiring.switches["text"] = TowerSwitch(config, packed=False)
    language_model = model.get_submodule(family.language_model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    builder.junction(language_model, "pre").bind(
        builder.point("hook_embed", tower="text"),
        lambda call: call.kwargs["inputs_embeds"],
        _set_embeds,
    )
    deepstack = wiring._deepstack = DeepStack(builder, language_model)
    for index, block in enumerate(model.get_submodule(family.text.blocks)):
        block_wiring = BlockWiring(builder, block, family.text, "", index, config.num_attention_heads, head_dim, switch)
        wiring.add(wiring.text, block_wiring)
        if index < family.n_deepstack(model):
            deepstack.bind(index, block)
    ln_final = builder.junction(model.get_submodule(family.ln_final), "post")
    for suffix, get, put in (
        ("hook_scale", norms.get_scale, norms.put_scale),
        ("hook_normalized", norms.get_normalized, norms.put_normalized),
    ):
        ln_final.bind(builder.point(f"ln_final.{suffix}", tower="text"), get, put)
    builder.junction(model.get_submodule(family.lm_head), "post").bind(
        builder.point("hook_logits", tower="text"), Call.main, Call.set_main
    )


def _set_embeds(call: Call, value: Tensor) -> None:
    call.kwargs = {**call.kwargs, "inputs_embeds": value}
    call.touched = True

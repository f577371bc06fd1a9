"""Makes every hook point of a model of any family, from the table, and binds it to the model's modules."""

import weakref
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn
from transformers import PreTrainedModel

from hooked_mllm.attention.backends import TowerSwitch
from hooked_mllm.attention.site import AttentionSite
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.families.base import Family
from hooked_mllm.hooks.module_hook import ModuleHook
from hooked_mllm.hooks.registry import HookRegistry
from hooked_mllm.hooks.table import PointSpec, TowerName, specs
from hooked_mllm.wiring.blocks import BlockWiring
from hooked_mllm.wiring.builder import Builder
from hooked_mllm.wiring.computed import BlockContext, NormAccess
from hooked_mllm.wiring.deepstack import DeepStack
from hooked_mllm.wiring.module_sides import outer_side


@dataclass
class Wiring:
    """A model's hook points and attention sites.

    Attributes:
        registry: All hook points by name.
        family: The family whose names the wiring follows.
        text: Attention sites of the language model, one a block.
        vision: Attention sites of the vision tower, one a block.
        switches: The attention switches, by tower.
        outputs: Output projections, by the name of the hook point of their z.
        unhooked: Attention sites of blocks whose output is not used: they have no hook points, as an edit would be
            lost.
    """

    registry: HookRegistry
    family: Family
    text: list[AttentionSite] = field(default_factory=list)
    vision: list[AttentionSite] = field(default_factory=list)
    switches: dict[str, TowerSwitch] = field(default_factory=dict)
    outputs: dict[str, nn.Module] = field(default_factory=dict)
    unhooked: list[AttentionSite] = field(default_factory=list)
    _deepstack: DeepStack | None = None

    @property
    def deepstack(self) -> DeepStack:
        """The visual features that are added between the first blocks; empty where a family has none."""
        assert self._deepstack is not None  # set by `wire`
        return self._deepstack

    def add(self, sites: list[AttentionSite], block: BlockWiring) -> None:
        """Make the points of one block, and add its attention site to those of its tower."""
        site = block.wire()
        sites.append(site)
        self.outputs[site.points["z"].name] = block.output_projection

    def output_projection(self, site: AttentionSite) -> nn.Module:
        """The module that maps z to the residual stream (W_O and its bias)."""
        return self.outputs[site.points["z"].name]


#: the wiring of each wrapped model
WIRED: "weakref.WeakKeyDictionary[nn.Module, weakref.ReferenceType[Wiring]]" = weakref.WeakKeyDictionary()


def wire(model: PreTrainedModel, family: Family) -> Wiring:
    """Make every hook point of `model` and bind it to its module; the model itself is not changed.

    Hook points belong to the model: a model that is wrapped again while an earlier wrapper exists gets the same ones.

    Args:
        model: A transformers model of one of the family's classes.
        family: The names of its modules.

    Raises:
        UnsupportedModelError: If the model lacks a module that the family names.

    Examples:
        >>> from hooked_mllm import HookedMLLM
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> wire(model.hf_model, model.family) is model.wiring
        True
    """
    reference = WIRED.get(model)
    wiring = None if reference is None else reference()
    if wiring is not None and wiring.family is family:
        return wiring
    registry = HookRegistry(type(model).__name__)
    builder = Builder(model, registry)
    wiring = Wiring(registry, family)
    try:
        wiring._deepstack = DeepStack(family)
        for tower in ("vision", "projector", "text"):
            _wire_tower(tower, model, builder, wiring)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks a part that the family {family.name!r} names: {error} This version of "
            "transformers may build the model in another way than this package supports."
        ) from error
    builder.finish()
    registry.on_run += [wiring.deepstack.fresh, *(switch.applied for switch in wiring.switches.values())]
    # weak: a hook may hold the wrapper, and a registered module hook is held by its module
    module_hooks = [weakref.ref(m) for m in builder.module_hooks.values()]
    weakref.finalize(wiring, _unregister, module_hooks, list(wiring.switches.values()))
    WIRED[model] = weakref.ref(wiring)
    return wiring


def _unregister(module_hooks: list[weakref.ReferenceType[ModuleHook]], switches: list[TowerSwitch]) -> None:
    """Remove all torch hooks of a model whose wrapper is gone."""
    for reference in module_hooks:
        module_hook = reference()
        if module_hook is not None:
            module_hook.detach()
    for switch in switches:
        switch.release()


def _wire_tower(tower: TowerName, model: PreTrainedModel, builder: Builder, wiring: Wiring) -> None:
    for in_block, entries in groupby(specs(tower), key=lambda spec: spec.in_block):
        if in_block:
            _wire_blocks(tower, model, builder, wiring)
            continue
        for spec in entries:
            _wire_outer(spec, tower, model, builder, wiring.family)


def _wire_outer(spec: PointSpec, tower: TowerName, model: PreTrainedModel, builder: Builder, family: Family) -> None:
    """A point outside of the blocks."""
    if spec.carrier == "norm":
        access = NormAccess.of(spec, getattr(family, spec.part or ""), packed=family.text.packed)
    else:
        access = outer_side(spec, model, family)
    if access is not None:
        builder.bind(builder.point(spec, tower), access)


def _wire_blocks(tower: TowerName, model: PreTrainedModel, builder: Builder, wiring: Wiring) -> None:
    """All points of all blocks of one tower."""
    family, vision = wiring.family, tower == "vision"
    parts, sites = (family.vision, wiring.vision) if vision else (family.text, wiring.text)
    sizes = family.vision_sizes(model) if vision else family.text_sizes(model)
    config = family.vision_config(model.config) if vision else family.text_config(model.config)
    switch = wiring.switches[tower] = TowerSwitch(config, parts.packed, wiring.registry.context)
    blocks = parts.modules(model)
    depth = family.vision_depth(model) if vision else len(blocks)
    n_deepstack = 0 if vision else family.n_deepstack(model)
    for layer, block in enumerate(blocks):
        deepstack = wiring.deepstack if layer < n_deepstack else None
        block_wiring = BlockWiring(builder, BlockContext(block, layer, parts, sizes, deepstack), tower, switch)
        if layer < depth:
            wiring.add(sites, block_wiring)
        else:
            wiring.unhooked.append(block_wiring.unhooked())

"""Makes every hook point of a model of any family, from the table, and binds it to the model's modules."""

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hooked_mllm.attention.backends import TowerSwitch
from hooked_mllm.attention.site import AttentionSite
from hooked_mllm.errors import HookValueError, UnsupportedModelError
from hooked_mllm.families.base import Family
from hooked_mllm.hooks.module_hook import ModuleHook
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import HookRegistry
from hooked_mllm.hooks.table import PointSpec, TowerName, specs
from hooked_mllm.wiring.access import Access
from hooked_mllm.wiring.builder import Builder
from hooked_mllm.wiring.compiled import UNCOMPILED
from hooked_mllm.wiring.computed import BlockContext, computed_access
from hooked_mllm.wiring.deepstack import DeepStack
from hooked_mllm.wiring.module_sides import block_side, outer_side
from hooked_mllm.wiring.norms import NORM_POINTS


@dataclass(frozen=True)
class BlockWiring:
    """The hook points of one block, bound in the order of the table, and its attention."""

    builder: Builder
    context: BlockContext
    tower: TowerName
    switch: TowerSwitch

    def wire(self) -> AttentionSite:
        """Make and bind every point of the block; returns its attention site."""
        attention_points: dict[str, HookPoint] = {}
        for spec in specs(self.tower, in_block=True):
            if spec.carrier == "attention":
                attention_points[spec.short] = self.builder.point(spec, self.tower, self.context.layer)
            elif access := self._access(spec):
                self.builder.bind(self.builder.point(spec, self.tower, self.context.layer), access)
        site = self._site(attention_points)
        for point in attention_points.values():
            self.builder.on_change(point, site.refresh)
        return site

    def unhooked(self) -> AttentionSite:
        """The attention of a block without hook points, which runs while its tower is hooked."""
        layer = self.context.layer
        attention_specs = [s for s in specs(self.tower, in_block=True) if s.carrier == "attention"]
        return self._site({s.short: HookPoint(s.short, tower=self.tower, block=layer) for s in attention_specs})

    def _access(self, spec: PointSpec) -> Access | None:
        """How a point is read and written; None if this block has no such point."""
        context, parts = self.context, self.context.tower.block
        if parts.names(spec.gain) or spec.carrier in ("norm", "computed"):
            return computed_access(spec, context)
        side = block_side(spec, context.block, context.layer, context.tower, context.sizes.d_head)
        if side is None and not spec.optional and parts.names(spec.part):
            context.path_of(spec.part or "")  # raises the error that names the missing module
        return side

    def _site(self, points: dict[str, HookPoint]) -> AttentionSite:
        context, tower = self.context, self.context.tower
        module = self.builder.model.get_submodule(context.path_of("attn"))
        return AttentionSite(
            module, context.layer, self.tower, self.switch, tower.causal, tower.softmax_float32, points
        )


@dataclass
class Wiring:
    """A model's hook points, and the attention site of each block of its language model and vision tower."""

    registry: HookRegistry
    family: Family
    text: list[AttentionSite] = field(default_factory=list)
    vision: list[AttentionSite] = field(default_factory=list)
    #: the attention switches, by tower
    switches: dict[str, TowerSwitch] = field(default_factory=dict)
    #: output projections, by the name of the hook point of their z
    outputs: dict[str, nn.Module] = field(default_factory=dict)
    #: sites of blocks whose output is not used: they have no hook points, as an edit would be lost
    unhooked: list[AttentionSite] = field(default_factory=list)
    _deepstack: DeepStack | None = None
    #: see `Builder.modules`
    modules: dict[str, tuple[nn.Module, str, nn.Module]] = field(default_factory=dict)

    @property
    def replaced(self) -> tuple[str, str, str] | None:
        """Path of a module that was replaced after the model was wrapped, and both classes; None if none was."""
        for path, (parent, name, module) in self.modules.items():
            present = parent._modules.get(name)
            if module not in (present, getattr(present, "_orig_mod", None)):  # `torch.compile(module)` still calls it
                return path, type(module).__name__, type(present).__name__
        return None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise if a module was replaced, whose hooks would miss what the new one does."""
        if (replaced := self.replaced) is not None:
            path, before, present = replaced
            raise HookValueError(
                f"{path} was a {before} when this model was wrapped and is a {present} now (an adapter was added or "
                "merged, or the module was replaced): hooks would miss what it does. Wrap the model again with "
                "HookedMLLM.from_model(model.hf_model, model.processor)."
            )
        yield

    @property
    def deepstack(self) -> DeepStack:
        """The visual features that are added between the first blocks; empty where a family has none."""
        assert self._deepstack is not None  # set by `wire`
        return self._deepstack

    @property
    def has_hooks(self) -> bool:
        """Whether a hook, a tap or a choice of attention is active, in any thread."""
        return (
            bool(self.registry.used)
            or any(site.has_taps for site in (*self.text, *self.vision))
            or any(len(switch.lasting) < switch.n_choices for switch in self.switches.values())
        )

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Run without compiled code, in the body of a `with`, if a hook, a tap or a backend is active here."""
        if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling() or not self._may_miss():
            yield
            return
        with UNCOMPILED:
            yield

    def _may_miss(self) -> bool:
        """Whether a hook, a tap or a backend is active that compiled code could miss."""
        if self.registry.in_use:
            return True
        for tower, sites in (("text", self.text), ("vision", self.vision)):
            # with `compile_blocks`, the attention is called between compiled pieces
            outside = bool(getattr(sites[0].implementation, "_torchdynamo_disable", False))
            if any(site.taps for site in sites) or (self.switches[tower].chosen and not outside):
                return True
        return False

    def add(self, sites: list[AttentionSite], block: BlockWiring) -> None:
        """Make the points of one block, and add its attention site to those of its tower."""
        site = block.wire()
        sites.append(site)
        self.outputs[site.points["z"].name] = block.builder.model.get_submodule(block.context.path_of("o"))

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
        UnsupportedModelError: If the model lacks one of them.

    Examples:
        >>> from hooked_mllm import HookedMLLM
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> wire(model.hf_model, model.family) is model.wiring
        True
    """
    reference = WIRED.get(model)
    wiring = None if reference is None else reference()
    if wiring is not None and wiring.family is family and wiring.replaced is None:
        return wiring
    registry = HookRegistry(type(model).__name__)
    builder = Builder(model, registry)
    wiring = Wiring(registry, family, modules=builder.modules)
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
    applied = [switch.applied for switch in wiring.switches.values()]
    registry.on_run += [_weak(wiring.unchanged), wiring.deepstack.fresh, *applied, _weak(wiring.uncompiled)]
    # weak: a hook may hold the wrapper, and a registered module hook is held by its module
    module_hooks = [weakref.ref(m) for m in builder.module_hooks.values()]
    weakref.finalize(wiring, _unregister, module_hooks, list(wiring.switches.values()))
    WIRED[model] = weakref.ref(wiring)
    return wiring


def _weak(method: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[Any]]:
    """A method that does not keep its object: a registered hook leads to the registry, and a wrapper must be freed."""
    reference = weakref.WeakMethod(method)

    def call() -> AbstractContextManager[Any]:
        alive = reference()
        return nullcontext() if alive is None else alive()

    return call


def _unregister(module_hooks: list[weakref.ReferenceType[ModuleHook]], switches: list[TowerSwitch]) -> None:
    """Remove all torch hooks of a model whose wrapper is gone."""
    for reference in module_hooks:
        if (module_hook := reference()) is not None:
            module_hook.detach()
    for switch in switches:
        switch.release()


def _wire_tower(tower: TowerName, model: PreTrainedModel, builder: Builder, wiring: Wiring) -> None:
    family = wiring.family
    for in_block, entries in groupby(specs(tower), key=lambda spec: spec.in_block):
        if in_block:
            _wire_blocks(tower, model, builder, wiring)
            continue
        for spec in entries:
            if spec.carrier == "norm":
                access = NORM_POINTS[spec.short](getattr(family, spec.part or ""), family.text.packed)
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

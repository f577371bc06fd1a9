"""ModuleSide: where the input or output of a module holds an activation, for hooks and for nnsight alike."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_mllm.families.base import Family, TowerParts
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.table import PointSpec, Side, spec_of, split_name
from hooked_mllm.wiring.access import Access, add_batch_axis, remove_batch_axis


@dataclass(frozen=True)
class ModuleSide(Access):
    """One side of one module, and the form of the activation in it."""

    path: str
    side: Side
    packed: bool = False  # whether the batch axis is missing
    d_head: int | None = None  # width of a head, where all heads are in one axis
    in_place: bool = False  # whether the model reads the same tensor again: an edit must be written into it
    argument: str | None = None  # the keyword argument that holds the activation; None for the first argument
    live = True

    def content(self, call: Call) -> Any:
        """What the module takes or returns: a tensor, or an output class whose fields the family reads."""
        if self.argument is not None:
            return call.kwargs[self.argument]
        return call.first() if self.side == "input" else call.main()

    def replace(self, call: Call, content: Any) -> None:
        """Replace what the module takes or returns."""
        if self.argument is not None:
            call.set_argument(self.argument, content)
        elif self.side == "input":
            call.set_first(content)
        else:
            call.set_main(content)

    def get(self, call: Call) -> Tensor:
        x = add_batch_axis(self.content(call), self.packed)
        if self.d_head is None or x.dim() == 4:  # norms of q and k return [batch pos head d_head]
            return x
        return rearrange(x, "batch pos (head d_head) -> batch pos head d_head", d_head=self.d_head)

    def put(self, call: Call, value: Tensor) -> None:
        current = self.content(call)
        if self.d_head is not None and add_batch_axis(current, self.packed).dim() == 3:
            value = rearrange(value, "batch pos head d_head -> batch pos (head d_head)")
        value = remove_batch_axis(value, self.packed)
        if not self.in_place:
            self.replace(call, value)
        elif value.data_ptr() != current.data_ptr():
            current.copy_(value)


@dataclass(frozen=True)
class FusedSide(ModuleSide):
    """q, k or v (`index` 0, 1, 2) in the output of one projection for all three: `[pos (3 head d_head)]`."""

    index: int = 0

    def split(self, call: Call) -> Shaped[Tensor, "3 batch pos head d_head"]:
        """q, k and v, a view of the projection's output."""
        x = add_batch_axis(call.main(), self.packed)
        return rearrange(x, "batch pos (qkv head d_head) -> qkv batch pos head d_head", qkv=3, d_head=self.d_head)

    def get(self, call: Call) -> Tensor:
        return self.split(call)[self.index]

    def put(self, call: Call, value: Tensor) -> None:
        qkv = list(self.split(call))
        qkv[self.index] = value
        fused = rearrange(qkv, "qkv batch pos head d_head -> batch pos (qkv head d_head)")
        call.set_main(remove_batch_axis(fused, self.packed))


@dataclass(frozen=True)
class FamilySide(ModuleSide):
    """An activation that functions of the family read and write, from and to what the module takes or returns."""

    live = False
    read: Callable[[Any], Tensor] = field(kw_only=True)
    write: Callable[[Tensor, Any], Any] = field(kw_only=True)

    def get(self, call: Call) -> Tensor:
        return self.read(self.content(call))

    def put(self, call: Call, value: Tensor) -> None:
        self.replace(call, self.write(value, self.content(call)))


def module_side(name: str, model: PreTrainedModel, family: Family) -> ModuleSide | None:
    """The module side that holds a hook point's activation; None if no module takes or returns it."""
    spec, (tower, layer, _) = spec_of(name), split_name(name)
    if spec is None:
        return None
    if layer is None:
        return outer_side(spec, model, family)
    parts = family.vision if tower == "vision" else family.text
    sizes = family.vision_sizes(model) if tower == "vision" else family.text_sizes(model)
    return block_side(spec, model.get_submodule(f"{parts.blocks}.{layer}"), layer, parts, sizes.d_head)


def block_side(spec: PointSpec, block: nn.Module, layer: int, tower: TowerParts, d_head: int) -> ModuleSide | None:
    """The module side of a point of one block; None if no module takes or returns the activation."""
    parts = tower.block
    if spec.part is None or parts.names(spec.gain) or spec.carrier in ("norm", "computed"):
        return None
    path = f"{tower.blocks}.{layer}"
    if parts.qkv is not None and spec.part in ("q", "k", "v"):
        return FusedSide(f"{path}.{parts.qkv}", "output", tower.packed, d_head, index="qkv".index(spec.part))
    inner = parts.path(spec.part, block)
    if inner is None:
        return None
    width = d_head if spec.splits_heads else None
    return ModuleSide(f"{path}.{inner}".rstrip("."), spec.side, tower.packed, width, spec.in_place, spec.argument)


def outer_side(spec: PointSpec, model: PreTrainedModel, family: Family) -> ModuleSide | None:
    """The module side of a point outside of the blocks; None if no module takes or returns the activation."""
    if spec.carrier == "family":
        if spec.part == "patch_embed":
            read, write = family.patch_embed_value, family.patch_embed_output
            return FamilySide(family.patch_embed, "output", read=read, write=write)
        return FamilySide(
            *family.vision_out_module(),
            read=lambda content: family.vision_out_value(content, model),
            write=lambda value, content: family.vision_out_replace(value, content, model),
        )
    if spec.part is None or spec.carrier != "module":
        return None
    packed = family.vision.packed if spec.towers[0] != "text" else family.text.packed
    return ModuleSide(getattr(family, spec.part), spec.side, packed, argument=spec.argument)

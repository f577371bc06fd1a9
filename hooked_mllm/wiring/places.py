"""Where activations lie among a model's modules, for what sees modules from outside: which side of which, and how."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mllm.families.base import Family, TowerParts
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.wiring.blocks import first_of

#: suffix of a block's hook point: the part of the block (a field of `BlockParts`, "" for the block), and its side
BLOCK = {
    "hook_resid_pre": ("", "input"),
    "attn.hook_q": ("q", "output"),
    "attn.hook_k": ("k", "output"),
    "attn.hook_v": ("v", "output"),
    "attn.hook_z": ("o", "input"),
    "hook_attn_out": ("attn", "output"),
    "hook_resid_mid": ("ln2", "input"),
    "mlp.hook_pre": ("mlp_in", "output"),
    "mlp.hook_pre_linear": ("mlp_linear", "output"),
    "mlp.hook_post": ("mlp_out", "input"),
    "hook_mlp_out": ("mlp", "output"),
    "hook_resid_post": ("", "output"),
}
HEADED = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")
IN_BLOCK = re.compile(r"(vision\.)?blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Place:
    """One side of one module, and how an activation lies in what passes there: the first of what passes, as it is.

    Attributes:
        module: The module's path.
        side: "input" or "output".
        packed: Whether the batch axis is missing.
        d_head: The width of a head, where heads lie side by side.
        in_place: Whether the model goes on with the very tensor that passes, so that an edit must be made in it.
    """

    module: str
    side: str
    packed: bool = False
    d_head: int | None = None
    in_place: bool = False

    def passing(self, call: Call) -> Tensor:
        """The tensor that passes."""
        return call.first() if self.side == "input" else call.main()

    def get(self, call: Call) -> Tensor:
        """The activation: always a view of what passes."""
        x = self.passing(call)[None] if self.packed else self.passing(call)
        return x if self.d_head is None or x.dim() == 4 else x.unflatten(-1, (-1, self.d_head))

    def put(self, call: Call, value: Tensor) -> None:
        """Let another activation pass."""
        value = value.reshape(self.passing(call).shape)
        call.set_first(value) if self.side == "input" else call.set_main(value)


@dataclass(frozen=True)
class FusedPlace(Place):
    """One of q, k and v of a packed tower, where one projection gives all three; `index` says which."""

    index: int = 0

    def get(self, call: Call) -> Tensor:
        """The activation."""
        return call.main().unflatten(-1, (3, -1, self.d_head))[None, :, self.index]

    def put(self, call: Call, value: Tensor) -> None:
        """Let another activation pass."""
        split = list(call.main().unflatten(-1, (3, -1, self.d_head)).unbind(1))
        split[self.index] = value[0]
        call.set_main(torch.stack(split, dim=1).flatten(1))


@dataclass(frozen=True)
class OtherPlace(Place):
    """A place of its own kind: `taken` gives the activation of a call, `given` what makes another one pass."""

    taken: Callable[[Call], Tensor] = Call.main
    given: Callable[[Call, Tensor], None] = Call.set_main

    def get(self, call: Call) -> Tensor:
        """The activation."""
        return self.taken(call)

    def put(self, call: Call, value: Tensor) -> None:
        """Let another activation pass."""
        self.given(call, value)


def place_of(name: str, model: nn.Module | Any, family: Family) -> Place | None:
    """The place of a hook point; None for what no module takes or returns.

    Args:
        name: The name of one of the model's hook points.
        model: The transformers model.
        family: Its family.
    """
    inside = IN_BLOCK.fullmatch(name)
    if inside is not None:
        vision, index, suffix = inside.groups()
        tower, config = family.text, family.text_config(model.config)
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if vision:
            tower, config = family.vision, family.vision_config(model.config)
            d_head = config.hidden_size // family.vision_heads(model.config)
        return _in_block(model, tower, f"{tower.blocks}.{index}", suffix, d_head)
    packed = family.vision.packed
    if name == "vision.hook_out":
        return _vision_out(model, family)
    whole = {
        "vision.hook_patch_embed": OtherPlace(
            family.patch_embed,
            "output",
            taken=lambda call: family.patch_embed_value(call.main()),
            given=lambda call, x: call.set_main(family.patch_embed_output(x, call.main())),
        ),
        "projector.hook_in": Place(family.projector, "input", packed),
        "projector.hook_out": Place(family.projector, "output", packed),
        "hook_embed": OtherPlace(
            family.language_model, "input", taken=lambda call: call.kwargs["inputs_embeds"], given=_set_embeds
        ),
        "hook_logits": Place(family.lm_head, "output"),
    }
    return whole.get(name)


def _in_block(model: Any, tower: TowerParts, block: str, suffix: str, d_head: int) -> Place | None:
    gains = {"hook_attn_out": tower.block.attn_gain, "hook_mlp_out": tower.block.mlp_gain}
    if suffix not in BLOCK or gains.get(suffix) is not None:
        return None  # a gain is applied by the block, outside of any module
    part, side = BLOCK[suffix]
    if tower.block.qkv is not None and part in ("q", "k", "v"):
        return FusedPlace(f"{block}.{tower.block.qkv}", side, True, d_head, index="qkv".index(part))
    path = block
    if part:
        module = model.get_submodule(block)
        path = f"{block}.{next(p for p in getattr(tower.block, part).split('|') if first_of(module, p) is not None)}"
    # the block adds the MLP to the very tensor that the norm before it is given
    in_place = suffix == "hook_resid_mid"
    return Place(path, side, tower.packed, d_head if suffix in HEADED else None, in_place)


def _vision_out(model: Any, family: Family) -> Place:
    path, side = family.vision_out_module()
    if side == "input":
        return OtherPlace(
            path,
            side,
            taken=lambda call: family.vision_out_value(call.first(), model),
            given=lambda call, x: call.set_first(family.vision_out_replace(x, call.first(), model)),
        )
    return OtherPlace(
        path,
        side,
        taken=lambda call: family.vision_out_value(call.output, model),
        given=lambda call, x: call.set_main(family.vision_out_replace(x, call.output, model)),
    )


def _set_embeds(call: Call, value: Tensor) -> None:
    call.kwargs = {**call.kwargs, "inputs_embeds": value}

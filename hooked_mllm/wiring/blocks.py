"""Joins the hook points of one transformer block, text or vision, to its modules."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hooked_mllm.attention.backends import TowerSwitch
from hooked_mllm.attention.site import AttentionSite
from hooked_mllm.families.base import BlockParts, TowerParts
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.wiring import norms
from hooked_mllm.wiring.builder import Builder


def first_of(block: nn.Module, paths: str) -> nn.Module | None:
    """The first of several `|`-separated module paths that the block has."""
    for path in paths.split("|"):
        try:
            return block.get_submodule(path)
        except AttributeError:
            continue
    return None


#: hook points of the attention function itself
ATTENTION_POINTS = ("rot_q", "rot_k", "attn_scores", "pattern", "z")


class BlockWiring:
    """The points of one block, bound in the order in which the forward pass meets them.

    Args:
        builder: Where points are made and junctions kept.
        block: The block's module.
        tower: What is known of its tower.
        prefix: "" for the language model, "vision." for the tower.
        index: The block's place in its tower.
        n_heads: Query heads.
        head_dim: Width of a head.
        switch: The tower's attention switch.
    """

    def __init__(
        self,
        builder: Builder,
        block: nn.Module,
        tower: TowerParts,
        prefix: str,
        index: int,
        n_heads: int,
        head_dim: int,
        switch: TowerSwitch,
    ) -> None:
        self.builder, self.block, self.tower, self.index = builder, block, tower, index
        self.parts: BlockParts = tower.block
        self.base = f"{prefix}blocks.{index}."
        self.kind = prefix.rstrip(".") or "text"
        self.n_heads, self.head_dim, self.switch = n_heads, head_dim, switch
        self.state: dict[str, Tensor] = {}

    def lift(self, x: Tensor) -> Tensor:
        """`[batch pos ...]` from what flows through the tower."""
        return x[None] if self.tower.packed else x

    def drop(self, x: Tensor) -> Tensor:
        """The inverse of `lift`."""
        return x[0] if self.tower.packed else x

    def point(self, suffix: str) -> HookPoint:
        """A new point of this block."""
        return self.builder.point(self.base + suffix, tower=self.kind, block=self.index)

    def module(self, path: str) -> nn.Module:
        """The block's submodule at `path`."""
        found = first_of(self.block, path)
        if found is None:
            raise AttributeError(f"{type(self.block).__name__} has no module {path!r}.")
        return found

    def wire(self) -> AttentionSite:
        """Make and bind every point of the block; returns its attention site."""
        parts = self.parts
        self._input(self.point("hook_resid_pre"))
        self._norm(parts.ln1, "ln1")
        self._projections()
        site = self._attention()
        self._result()
        if parts.attn_gain is None:
            self._output(self.point("hook_attn_out"), parts.attn)
        else:
            self._scaled_attn_out(self.point("hook_attn_out"))
        self._resid_mid(self.point("hook_resid_mid"))
        self._norm(parts.ln2, "ln2")
        self._mlp()
        self._output(self.point("hook_resid_post"), "")
        return site

    # -- pieces ----------------------------------------------------------------------------------------------------

    def _input(self, point: HookPoint) -> None:
        self.builder.junction(self.block, "pre").bind(
            point, lambda call: self.lift(call.first()), lambda call, x: call.set_first(self.drop(x))
        )

    def _output(self, point: HookPoint, path: str) -> None:
        module = self.module(path) if path else self.block
        self.builder.junction(module, "post").bind(
            point, lambda call: self.lift(call.main()), lambda call, x: call.set_main(self.drop(x))
        )

    def _norm(self, path: str, name: str) -> None:
        junction = self.builder.junction(self.module(path), "post")
        for suffix, get, put in (
            ("hook_scale", norms.get_scale, norms.put_scale),
            ("hook_normalized", norms.get_normalized, norms.put_normalized),
        ):
            junction.bind(self.point(f"{name}.{suffix}"), *self._lifted(get, put))

    def _lifted(
        self, get: Callable[[Call], Tensor], put: Callable[[Call, Tensor], None]
    ) -> tuple[Callable[[Call], Tensor], Callable[[Call, Tensor], None]]:
        return (lambda call: self.lift(get(call))), (lambda call, x: put(call, self.drop(x)))

    def _projections(self) -> None:
        parts = self.parts
        if parts.qkv is not None:
            junction = self.builder.junction(self.module(parts.qkv), "post")
            for place, name in enumerate("qkv"):
                junction.bind(self.point(f"attn.hook_{name}"), *self._fused(place))
            return
        for name, path in (("q", parts.q), ("k", parts.k), ("v", parts.v)):
            assert path is not None
            module = self.module(path)
            self.builder.junction(module, "post").bind(
                self.point(f"attn.hook_{name}"),
                lambda call: self._heads(self.lift(call.main())),
                lambda call, x: call.set_main(self.drop(x).reshape(call.main().shape)),
            )

    def _heads(self, x: Tensor) -> Tensor:
        return x if x.dim() == 4 else x.unflatten(-1, (-1, self.head_dim))

    def _fused(self, place: int) -> tuple[Callable[[Call], Tensor], Callable[[Call, Tensor], None]]:
        def get(call: Call) -> Tensor:
            return self.lift(call.main().unflatten(-1, (3, self.n_heads, -1))[:, place])

        def put(call: Call, x: Tensor) -> None:
            split = list(call.main().unflatten(-1, (3, self.n_heads, -1)).unbind(1))
            split[place] = self.drop(x)
            call.set_main(torch.stack(split, dim=1).flatten(1))

        return get, put

    def bystander(self) -> AttentionSite:
        """The attention of a block that is to have no hook points, for as long as its tower is hooked."""
        return self._site({name: HookPoint(name, tower=self.kind, block=self.index) for name in ATTENTION_POINTS})

    def _attention(self) -> AttentionSite:
        points = {name: self.point(f"attn.hook_{name}") for name in ATTENTION_POINTS}
        site = self._site(points)
        for point in points.values():
            self.builder.on_change(point, site.refresh)
        return site

    def _site(self, points: dict[str, HookPoint]) -> AttentionSite:
        tower = self.tower
        return AttentionSite(
            self.module(self.parts.attn),
            self.index,
            self.kind,
            self.switch,
            tower.causal,
            tower.softmax_float32,
            points,
        )

    def _result(self) -> None:
        def get(call: Call) -> Tensor:
            z = self.lift(call.first()).unflatten(-1, (self.n_heads, self.head_dim))
            return head_results(z, call.module)

        def put(call: Call, result: Tensor) -> None:
            out, module = result.sum(-2), cast(Any, call.module)
            call.set_main(self.drop(out if module.bias is None else out + module.bias))

        self.builder.junction(self.module(self.parts.o), "post").bind(self.point("attn.hook_result"), get, put)

    def _resid_mid(self, point: HookPoint) -> None:
        # The block adds the MLP to this very tensor and hands it to the norm: an edit has to be made in place.
        def put(call: Call, x: Tensor) -> None:
            place, new = call.first(), self.drop(x)
            if new.data_ptr() != place.data_ptr():
                place.copy_(new)

        self.builder.junction(self.module(self.parts.ln2), "pre").bind(point, lambda call: self.lift(call.first()), put)

    def _scaled_attn_out(self, point: HookPoint) -> None:
        # LayerScale: the gain is applied by the block, outside any module, so the point sits where the sum arrives.
        gain = self.parts.attn_gain
        assert gain is not None

        def keep(name: str, take: Callable[[Call], Tensor]) -> Callable[[Call], None]:
            return lambda call: self.state.__setitem__(name, take(call))

        self.builder.junction(self.module(self.parts.ln1), "pre").watch(keep("resid_pre", Call.first), [point])
        self.builder.junction(self.module(self.parts.attn), "post").watch(keep("attn", Call.main), [point])

        def get(call: Call) -> Tensor:
            call.state["resid_pre"] = self.state.pop("resid_pre")
            return getattr(self.block, gain) * self.state.pop("attn")

        def put(call: Call, x: Tensor) -> None:
            call.first().copy_(x + call.state["resid_pre"])

        self.builder.junction(self.module(self.parts.ln2), "pre").bind(point, get, put)

    def _mlp(self) -> None:
        parts = self.parts
        inner = first_of(self.block, parts.mlp_in)
        if inner is not None:  # a mixture of experts has no single hidden layer
            self._output(self.point("mlp.hook_pre"), parts.mlp_in)
            if parts.mlp_linear is not None:
                self._output(self.point("mlp.hook_pre_linear"), parts.mlp_linear)
            self.builder.junction(self.module(parts.mlp_out), "pre").bind(
                self.point("mlp.hook_post"),
                lambda call: self.lift(call.first()),
                lambda call, x: call.set_first(self.drop(x)),
            )
        point = self.point("hook_mlp_out")
        if parts.mlp_gain is None:
            self._output(point, parts.mlp)
            return
        gain = parts.mlp_gain
        ln2, mlp = self.module(parts.ln2), self.module(parts.mlp)
        self.builder.junction(ln2, "pre").watch(lambda call: self.state.__setitem__("mid", call.first()), [point])
        self.builder.junction(mlp, "post").watch(lambda call: self.state.__setitem__("mlp", call.main()), [point])

        def get(call: Call) -> Tensor:
            call.state["mid"] = self.state.pop("mid")
            return getattr(self.block, gain) * self.state.pop("mlp")

        self.builder.junction(self.block, "post").bind(point, get, lambda call, x: call.set_main(x + call.state["mid"]))


def head_results(z: Tensor, o_proj: Any, device: torch.device | str | None = None) -> Tensor:
    """What each head writes to the residual stream, `z_h W_O[h]`: `[batch pos head d_model]`."""
    weight = o_proj.weight.unflatten(1, (z.shape[-2], z.shape[-1]))
    return torch.einsum("bphd,mhd->bphm", z, weight.to(device or z.device, z.dtype))

"""Makes the hook points of one transformer block, text or vision, from the table, and its attention site."""

from torch import nn

from hooked_mllm.attention.backends import TowerSwitch
from hooked_mllm.attention.site import AttentionSite
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.table import PointSpec, TowerName, specs
from hooked_mllm.wiring.access import Access
from hooked_mllm.wiring.builder import Builder
from hooked_mllm.wiring.computed import BlockContext, computed_access
from hooked_mllm.wiring.module_sides import block_side


class BlockWiring:
    """The hook points of one block, bound in the order of the table.

    Args:
        builder: Makes the points and module hooks.
        context: The block.
        tower: "text" or "vision".
        switch: The tower's attention switch.
    """

    def __init__(self, builder: Builder, context: BlockContext, tower: TowerName, switch: TowerSwitch) -> None:
        self.builder, self.context, self.switch = builder, context, switch
        self.tower: TowerName = tower

    @property
    def output_projection(self) -> nn.Module:
        """The module that maps z to the residual stream (W_O and its bias)."""
        return self.builder.model.get_submodule(self.context.path_of("o"))

    def wire(self) -> AttentionSite:
        """Make and bind every point of the block; returns its attention site.

        Raises:
            AttributeError: If the block lacks a module of which the family names the path.
        """
        attention_points: dict[str, HookPoint] = {}
        for spec in specs(self.tower, in_block=True):
            if spec.carrier == "attention":
                attention_points[spec.short] = self._point(spec)
                continue
            access = self._access(spec)
            if access is not None:
                self.builder.bind(self._point(spec), access)
        site = self._site(attention_points)
        for point in attention_points.values():
            self.builder.on_change(point, site.refresh)
        return site

    def unhooked(self) -> AttentionSite:
        """The attention of a block without hook points, which runs while its tower is hooked."""
        layer = self.context.layer
        attention_specs = [s for s in specs(self.tower, in_block=True) if s.carrier == "attention"]
        return self._site({s.short: HookPoint(s.short, tower=self.tower, block=layer) for s in attention_specs})

    def _point(self, spec: PointSpec) -> HookPoint:
        return self.builder.point(spec, self.tower, self.context.layer)

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

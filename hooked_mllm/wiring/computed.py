"""Getters and setters of activations that no module takes or returns: one class each.

A hook point with `carrier="computed"` in the table is served by the class that `COMPUTED` names for it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mllm.errors import HookNameError
from hooked_mllm.families.base import TowerParts, TowerSizes
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.table import PointSpec, Side
from hooked_mllm.wiring import norms
from hooked_mllm.wiring.access import Access, Watcher, add_batch_axis, remove_batch_axis
from hooked_mllm.wiring.deepstack import DeepStack, DeepStackFeatures
from hooked_mllm.wiring.results import head_results

Stream = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class BlockContext:
    """One block of a model, as the hook points of the block need it.

    Attributes:
        block: The block.
        layer: Its index in the tower.
        tower: The parts of the tower.
        sizes: The sizes of the tower.
        deepstack: The features that are added after the first blocks; None after this one.
    """

    block: nn.Module
    layer: int
    tower: TowerParts
    sizes: TowerSizes
    deepstack: DeepStack | None = None

    @property
    def path(self) -> str:
        """Path of the block in the model."""
        return f"{self.tower.blocks}.{self.layer}"

    def path_of(self, part: str) -> str:
        """Path of a part of the block in the model.

        Raises:
            AttributeError: If the block has no such module.
        """
        inner = self.tower.block.path(part, self.block)
        if inner is None:
            raise AttributeError(f"{type(self.block).__name__} has no module {getattr(self.tower.block, part)!r}.")
        return f"{self.path}.{inner}".rstrip(".")


@dataclass(frozen=True)
class NormAccess(Access):
    """`hook_scale` or `hook_normalized` of a norm."""

    path: str
    packed: bool
    read: Callable[[Call], Tensor]
    write: Callable[[Call, Tensor], None]
    side: Side = "output"

    @classmethod
    def of(cls, spec: PointSpec, path: str, packed: bool) -> "NormAccess":
        """The access for an entry of the table, at the norm at `path`."""
        return cls(path, packed, *norms.READ_WRITE[spec.short])

    def get(self, call: Call) -> Float[Tensor, "batch pos _"]:
        """The scale or the normalised input."""
        return add_batch_axis(self.read(call), self.packed)

    def put(self, call: Call, value: Float[Tensor, "batch pos _"]) -> None:
        """Compute the norm's output from another scale or normalised input."""
        self.write(call, remove_batch_axis(value, self.packed))


@dataclass(frozen=True)
class HeadResults(Access):
    """`hook_result`: what each head writes, from z and the output projection."""

    path: str
    packed: bool
    n_heads: int
    side: Side = "output"

    @classmethod
    def of(cls, context: BlockContext) -> "HeadResults":
        """The access in one block."""
        return cls(context.path_of("o"), context.tower.packed, context.sizes.n_heads)

    def get(self, call: Call) -> Float[Tensor, "batch pos head d_model"]:
        """The results, computed from the input of the projection."""
        z = add_batch_axis(call.first(), self.packed)
        z = rearrange(z, "batch pos (head d_head) -> batch pos head d_head", head=self.n_heads)
        return head_results(z, call.module)

    def put(self, call: Call, value: Float[Tensor, "batch pos head d_model"]) -> None:
        """Let the projection return the sum over heads, plus its bias."""
        out, bias = value.sum(-2), cast(Tensor | None, call.module.bias)  # [batch pos d_model], [d_model]
        call.set_main(remove_batch_axis(out if bias is None else out + bias, self.packed))


@dataclass(frozen=True)
class ScaledOutput(Access):
    """`hook_attn_out` or `hook_mlp_out` of a block with LayerScale, which multiplies a module's output by a gain.

    The block adds `gain * output` to the residual stream outside of any module, so the activation is read and written
    where the sum arrives.

    Attributes:
        path: The module that takes or returns the sum.
        side: The side of it.
        packed: Whether the batch axis is missing.
        block: The block, which has the gain as a parameter.
        gain: The parameter's name.
        output_of: The module whose output is scaled.
        stream_into: The norm whose input is the residual stream before the addition.
    """

    path: str
    side: Side
    packed: bool
    block: nn.Module
    gain: str
    output_of: str
    stream_into: str
    #: the streams and outputs of the calls in progress; several where a hook runs the model inside of a run
    kept: dict[str, list[Tensor]] = field(default_factory=lambda: {"stream": [], "output": []})

    @classmethod
    def of(cls, spec: PointSpec, context: BlockContext) -> "ScaledOutput":
        """The access in one block, for attention or the MLP."""
        after_attention = spec.part == "attn"
        return cls(
            path=context.path_of("ln2") if after_attention else context.path,
            side="input" if after_attention else "output",
            packed=context.tower.packed,
            block=context.block,
            gain=getattr(context.tower.block, spec.gain or ""),
            output_of=context.path_of(spec.part or ""),
            stream_into=context.path_of("ln1" if after_attention else "ln2"),
        )

    def watchers(self) -> list[Watcher]:
        """Keep the stream before the addition, and the output that is added to it."""
        return [
            (self.stream_into, "input", lambda call: self.kept["stream"].append(call.first())),
            (self.output_of, "output", lambda call: self.kept["output"].append(call.main())),
        ]

    def get(self, call: Call) -> Stream:
        """The output times the gain."""
        call.state["stream"] = self.kept["stream"].pop()
        gain: Tensor = getattr(self.block, self.gain)  # [d_model]
        return add_batch_axis(gain * self.kept["output"].pop(), self.packed)

    def put(self, call: Call, value: Stream) -> None:
        """Let the sum be the stream plus `value`."""
        total = remove_batch_axis(value, self.packed) + call.state["stream"]
        if self.side == "input":
            call.first().copy_(total)  # the block adds the MLP's output to this same tensor
        else:
            call.set_main(total)


#: how the activations are read and written that are computed in a block, by the suffix of their hook points
COMPUTED: dict[str, Callable[[BlockContext], Access | None]] = {
    "attn.hook_result": HeadResults.of,
    "hook_deepstack": lambda context: DeepStackFeatures.of(context.deepstack, context.path, context.layer),
}


def computed_access(spec: PointSpec, context: BlockContext) -> Access | None:
    """The access of a point of a block that no module takes or returns; None if the block has no such activation.

    Raises:
        HookNameError: If the table names a computed point for which there is no getter and setter.
    """
    if spec.carrier == "norm":
        return NormAccess.of(spec, context.path_of(spec.part or ""), context.tower.packed)
    if spec.gain is not None:
        return ScaledOutput.of(spec, context)
    if spec.suffix not in COMPUTED:
        raise HookNameError(
            f"The table of hook points has {spec.suffix!r} as computed, but wiring/computed.py has no getter and "
            "setter for it: add them to COMPUTED."
        )
    return COMPUTED[spec.suffix](context)

"""Getters and setters of activations that no module takes or returns; `COMPUTED` lists them by hook point."""

from collections.abc import Callable
from dataclasses import dataclass, field

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mllm.errors import HookNameError
from hooked_mllm.families.base import TowerParts, TowerSizes
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.table import PointSpec, Side
from hooked_mllm.wiring.access import Access, Watcher, add_batch_axis, remove_batch_axis
from hooked_mllm.wiring.deepstack import DeepStack, DeepStackFeatures
from hooked_mllm.wiring.norms import NORM_POINTS
from hooked_mllm.wiring.results import head_results, is_plain

Stream = Float[Tensor, "batch pos d_model"]


@dataclass(frozen=True)
class BlockContext:
    """One block of a model, with the parts and sizes of its tower."""

    block: nn.Module
    layer: int
    tower: TowerParts
    sizes: TowerSizes
    deepstack: DeepStack | None = None  # None where no features are added after the block

    @property
    def path(self) -> str:
        """Path of the block in the model."""
        return f"{self.tower.blocks}.{self.layer}"

    def path_of(self, part: str) -> str:
        """Path of a part of the block in the model; an `AttributeError` if the block has no such module."""
        inner = self.tower.block.path(part, self.block)
        if inner is None:
            raise AttributeError(f"{type(self.block).__name__} has no module {getattr(self.tower.block, part)!r}.")
        return f"{self.path}.{inner}".rstrip(".")


@dataclass(frozen=True)
class HeadResults(Access):
    """`hook_result`: what each head writes, from z and the output projection."""

    path: str
    packed: bool
    n_heads: int
    side: Side = "output"

    def get(self, call: Call) -> Float[Tensor, "batch pos head d_model"]:
        z = add_batch_axis(call.first(), self.packed)
        z = rearrange(z, "batch pos (head d_head) -> batch pos head d_head", head=self.n_heads)
        results = head_results(z, call.module)
        if not is_plain(call.module):
            call.state["results"] = results.sum(-2)  # before hooks edit them in place
        return results

    def put(self, call: Call, value: Float[Tensor, "batch pos head d_model"]) -> None:
        out = remove_batch_axis(value.sum(-2), self.packed)  # [batch pos d_model]
        if is_plain(call.module):
            bias: Tensor | None = call.module.bias  # type: ignore[assignment]
            call.set_main(out if bias is None else out + bias)
        else:  # a quantised module does not add up exactly: only the edit changes its output
            call.set_main(call.main() + (out - remove_batch_axis(call.state["results"], self.packed)))


@dataclass(frozen=True)
class ScaledOutput(Access):
    """`hook_attn_out` or `hook_mlp_out` of a block with LayerScale, which adds `gain * output` to the residual stream.

    It does so outside of any module: the activation is read and written at the module that takes or returns the sum.
    """

    path: str
    side: Side
    packed: bool
    block: nn.Module
    gain: str  # the block's parameter
    output_of: str  # the module whose output is scaled
    stream_into: str  # the norm whose input is the residual stream before the addition
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
        return [
            (self.stream_into, "input", lambda call: self.kept["stream"].append(call.first())),
            (self.output_of, "output", self._keep_scaled),
        ]

    def _keep_scaled(self, call: Call) -> None:
        gain: Tensor = getattr(self.block, self.gain)  # [d_model]; offloaded, it is in memory only inside of the block
        self.kept["output"].append(gain * call.main())

    def get(self, call: Call) -> Stream:
        call.state["stream"] = self.kept["stream"].pop()
        return add_batch_axis(self.kept["output"].pop(), self.packed)

    def put(self, call: Call, value: Stream) -> None:
        total = remove_batch_axis(value, self.packed) + call.state["stream"]
        if self.side == "input":
            call.first().copy_(total)  # the block adds the MLP's output to this same tensor
        else:
            call.set_main(total)


#: how the activations are read and written that are computed in a block, by the suffix of their hook points
COMPUTED: dict[str, Callable[[BlockContext], Access | None]] = {
    "attn.hook_result": lambda context: HeadResults(context.path_of("o"), context.tower.packed, context.sizes.n_heads),
    "hook_deepstack": lambda context: (
        context.deepstack and DeepStackFeatures(context.deepstack, context.path, context.layer)
    ),
}


def computed_access(spec: PointSpec, context: BlockContext) -> Access | None:
    """The access of a point of a block that no module takes or returns; None if the block has no such activation."""
    if spec.carrier == "norm":
        return NORM_POINTS[spec.short](context.path_of(spec.part or ""), context.tower.packed)
    if spec.gain is not None:
        return ScaledOutput.of(spec, context)
    if spec.suffix not in COMPUTED:
        raise HookNameError(
            f"The table of hook points has {spec.suffix!r} as computed, but wiring/computed.py has no getter and "
            "setter for it: add them to COMPUTED."
        )
    return COMPUTED[spec.suffix](context)

"""A recorded forward pass of the language model that can be resumed at any block."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mllm.attention.site import AttentionCall
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.measuring.shared_prefix import tapping
from hooked_mllm.objectives import gather_logits
from hooked_mllm.sweep.prefix import Prefix, suffix_mask
from hooked_mllm.wiring.compiled import UNCOMPILED
from hooked_mllm.wiring.results import device_of


@checked
@dataclass
class Trunk:
    """The arguments of each decoder block in a run, from which it can be resumed.

    Rows of a resumed run are repeated samples: row `sample * repeats + repeat`.

    Attributes:
        model: The `HookedMLLM`.
        inputs: The inputs of the run.
        residual: The residual stream entering each block, before its hooks; the last entry leaves the last block.
        arguments: The other arguments of each block.
        features: DeepStack's features `[visual d_model]`, one tensor for each block that adds them.
        visual: The mask of visual positions that DeepStack uses.
        compiled: Whether blocks without hooks are compiled.
    """

    model: Model
    inputs: ResolvedInput
    residual: list[Float[Tensor, "batch pos d_model"]] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    visual: Tensor | None = None
    compiled: bool = False
    _compiled: dict[int, Callable[..., Tensor]] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def record(cls, model: Model, inputs: ResolvedInput, device: torch.device | str | None = None) -> "Trunk":
        """Run the model once, with its hooks; `device` keeps the residual streams, by default that of each block."""
        trunk, context = cls(model, inputs), model.registry.context
        family, hf, outer = model.family, model.hf_model, context.run
        blocks = hf.get_submodule(family.text.blocks)
        left: list[bool] = []  # filled between the last block and the final norm

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if recorded():
                trunk.features, trunk.visual = family.deepstack_of(kwargs)

        def recorded() -> bool:  # not a run that a hook starts inside of this one
            return context.run is not None and context.run.parent is outer

        def keep(residual: Tensor) -> None:
            # a copy: a hook may edit the stream in place
            if recorded():
                trunk.residual.append(residual.detach().to(device or residual.device, copy=True))

        def enter_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = dict(kwargs)
            keep(args[0] if args else arguments.pop("hidden_states"))
            if recorded():
                trunk.arguments.append(arguments)

        def leave_blocks(*_: object) -> None:
            if recorded():
                left.append(True)

        def enter_norm(_: nn.Module, args: tuple[Any, ...]) -> None:
            if left and recorded():  # not a hook that calls the norm, as `logit_lens` does
                left.clear()
                keep(args[0])

        # before the hooks of hook points, whose edits are made again when the run is resumed
        with context.lock, UNCOMPILED, ExitStack() as stack:  # never in a run of another thread, nor in compiled code
            for block in blocks:
                stack.enter_context(block.register_forward_pre_hook(enter_block, prepend=True, with_kwargs=True))
            stack.enter_context(blocks[-1].register_forward_hook(leave_blocks))  # after the hooks of hook points
            stack.enter_context(model.ln_final.register_forward_pre_hook(enter_norm, prepend=True))
            language_model = hf.get_submodule(family.language_model)
            stack.enter_context(language_model.register_forward_pre_hook(enter, with_kwargs=True))
            model.run_trunk(inputs)
        return trunk

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.arguments)

    @cached_property
    def attention(self) -> list[AttentionCall]:
        """Keys, values and masks of every block, which the end of the sequence needs of its beginning."""
        calls: list[AttentionCall] = []
        with tapping(self.model, calls.append), torch.no_grad():
            self.model.run_trunk(self.inputs)
        for call in calls:
            call.q = call.q[:0]  # not needed, and of the size of the residual stream
        return calls

    @property
    def alone(self) -> bool:
        """Whether the language model has no active hook, and an attention whose masks are known."""
        registry, wiring = self.model.registry, self.model.wiring
        active = any(point.active for point in registry.registered if point.tower == "text")
        sites = any(site.taps or site.backend is not None for site in wiring.text)
        return not active and not sites and wiring.switches["text"].base in ("sdpa", "eager")

    def start(self, layer: int, repeats: int, first: int = 0) -> Float[Tensor, "row pos d_model"]:
        """The residual stream entering a block, each sample `repeats` times, from position `first` on."""
        device = device_of(self._block(layer))
        # [batch pos d_model] -> [row pos d_model]
        return self.residual[layer][:, first:].to(device).repeat_interleave(repeats, dim=0)

    def _block(self, layer: int) -> nn.Module:
        """A block; the final norm after the last."""
        if layer == self.n_layers:
            return self.model.ln_final
        return self.model.hf_model.get_submodule(self.model.family.text.blocks)[layer]

    @torch.no_grad()
    def resume(
        self, layer: int, residual: Float[Tensor, "row pos d_model"], stop: int | None = None, first: int = 0
    ) -> Float[Tensor, "row pos d_model"]:
        """Run the blocks from `layer` to before `stop` (None: all), with their hooks.

        Args:
            layer: The first block to run.
            residual: The stream entering it, with the rows of `start`.
            stop: The first block that is not run; None for the end.
            first: The first position of `residual`. Keys and values before it are those of the recorded run.
        """
        model, batch = self.model, self.inputs.batch
        repeats = len(residual) // batch
        stop = self.n_layers if stop is None else stop
        visual = None if self.visual is None else _repeated(self.visual[:, first:], batch, repeats)
        compiled = self.compiled and first == 0 and self.alone
        held = model.wiring.deepstack.holding(self._features(repeats, first), visual)
        with model.registry.running_on(self.inputs, first), held as features:
            for index in range(layer, stop):
                block = self._compiled_block(index) if compiled else self._block(index)
                residual = block(residual, **self._arguments(index, repeats, first))
                if index < len(features):
                    assert visual is not None
                    mask = visual.to(residual.device)  # [row pos], as many visual positions as features
                    residual = residual.clone()
                    residual[mask] = residual[mask] + features[index].to(residual.device, residual.dtype)
        return residual

    def _compiled_block(self, index: int) -> Callable[..., Tensor]:
        if index not in self._compiled:
            self._compiled[index] = torch.compile(self._block(index), dynamic=False)
        return self._compiled[index]

    @torch.no_grad()
    def logits(
        self, residual: Float[Tensor, "row pos d_model"], positions: Int[Tensor, "batch n"], first: int = 0
    ) -> Float[Tensor, "row n d_vocab"]:
        """Logits at positions of each sample, from the stream that leaves the last block.

        Positions before `first`, which are not in `residual`, are those of the recorded run.
        """
        model = self.model
        repeats = len(residual) // self.inputs.batch
        if first and bool(((positions >= 0) & (positions < first)).any()):
            prefix = self.start(self.n_layers, repeats)[:, :first].to(residual.device)
            residual, first = torch.cat([prefix, residual], dim=1), 0
        index = torch.where(positions < 0, positions, positions - first).repeat_interleave(repeats, dim=0)  # [row n]
        after_blocks = ("ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits")
        with model.registry.running_on(self.inputs):
            if any(model.registry[name].active for name in after_blocks):  # hooks there expect every position
                return gather_logits(model.lm_head(model.ln_final(residual)), index)
            return model.lm_head(model.ln_final(gather_logits(residual, index)))

    def _features(self, repeats: int, first: int) -> list[Tensor]:
        """DeepStack's features for every row, in the order in which a mask `[row pos]` selects them."""
        if not self.features:
            return []
        assert self.visual is not None
        late = self.visual.nonzero()[:, 1] >= first  # [visual]
        counts = self.visual[:, first:].sum(1).tolist()  # visual positions of each sample
        kept = [f[late.to(f.device)] if first else f for f in self.features]
        # [visual d_model] -> [repeats * visual d_model], sample by sample
        return [torch.cat([part.repeat(repeats, 1) for part in f.split(counts)]) for f in kept]

    def _arguments(self, layer: int, repeats: int, first: int) -> dict[str, Any]:
        batch, arguments = self.inputs.batch, self.arguments[layer]
        if first:
            call = self.attention[layer]
            arguments = {
                **{name: _suffix(value, first, self.inputs.length) for name, value in arguments.items()},
                "attention_mask": suffix_mask(call, first, self.model.wiring.switches["text"].base),
                "past_key_values": Prefix(call, first, repeats),
            }
        if repeats == 1:
            return arguments
        return {name: _repeated(value, batch, repeats) for name, value in arguments.items()}


def _suffix(value: object, first: int, length: int) -> Any:
    """An argument of a block from position `first` on: cosines, sines `[batch pos d]`, position ids `[batch pos]`."""
    if isinstance(value, tuple):
        return tuple(_suffix(v, first, length) for v in value)
    if isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] == length:
        return value[:, first:]
    return value


def _repeated(value: object, batch: int, repeats: int) -> Any:
    """An argument of a block for every row: tensors with a batch axis are repeated, all others are shared."""
    if isinstance(value, tuple):
        return tuple(_repeated(v, batch, repeats) for v in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) not in (1, batch):
        return value
    if len(value) == 1:
        return value.expand(batch * repeats, *value.shape[1:])
    return value.repeat_interleave(repeats, dim=0)

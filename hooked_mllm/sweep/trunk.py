"""A forward pass of the language model that can be taken up again at any block."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.inputs import ResolvedInput
from hooked_mllm.objectives import gather_logits


@dataclass
class Trunk:
    """What each decoder block was called with, and the means to go on from there.

    Rows of a resumed run are samples repeated side by side: row `sample * repeats + repeat`.

    Attributes:
        model: The `HookedMLLM`.
        inputs: What was run.
        residual: The residual stream entering each block, before its hooks; the last one leaves the last block.
        arguments: The other arguments of each block.
    """

    model: Any
    inputs: ResolvedInput
    residual: list[Float[Tensor, "batch pos d_model"]] = field(default_factory=list)
    arguments: list[dict[str, Any]] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    visual: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def record(cls, model: Any, inputs: ResolvedInput, device: torch.device | str | None = None) -> "Trunk":
        """Run the model once, under whatever hooks hang now, and keep what enters each block.

        Args:
            model: A `HookedMLLM`.
            inputs: What to run.
            device: Where the residual streams are kept; None for where they are.
        """
        trunk = cls(model, inputs)
        family, hf = model.family, model.hf_model
        blocks = hf.get_submodule(family.text.blocks)
        handles = []

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            trunk.features = list(kwargs.get("deepstack_visual_embeds") or ())
            trunk.visual = kwargs.get("visual_pos_masks")

        def keep(residual: Tensor) -> None:
            # a hook may edit the stream in place: what is kept must not be what it is handed
            kept = residual.detach().clone() if device is None else residual.detach().to(device, copy=True)
            trunk.residual.append(kept)

        def block(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            more = dict(kwargs)
            keep(args[0] if args else more.pop("hidden_states"))
            trunk.arguments.append(more)

        def end(_: Any, args: tuple[Any, ...]) -> None:
            keep(args[0])

        try:
            # in front of the hook points' own: an edit of the stream is made again when the run is taken up
            entrance = hf.get_submodule(family.language_model)
            handles.append(entrance.register_forward_pre_hook(enter, with_kwargs=True))
            for module in blocks:
                handles.append(module.register_forward_pre_hook(block, prepend=True, with_kwargs=True))
            handles.append(hf.get_submodule(family.ln_final).register_forward_pre_hook(end, prepend=True))
            model.run_trunk(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return trunk

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.arguments)

    def start(self, layer: int, repeats: int) -> Float[Tensor, "row pos d_model"]:
        """The residual stream entering a block, each sample `repeats` times."""
        blocks = self.model.hf_model.get_submodule(self.model.family.text.blocks)
        weight = next(blocks[layer].parameters()) if layer < self.n_layers else self.model.ln_final.weight
        return self.residual[layer].to(weight.device).repeat_interleave(repeats, dim=0)

    @torch.no_grad()
    def resume(
        self,
        layer: int,
        residual: Float[Tensor, "row pos d_model"],
        stop: int | None = None,
    ) -> Float[Tensor, "row pos d_model"]:
        """Run the blocks from `layer` on, hooks and all.

        Args:
            layer: The first block to run.
            residual: What enters it; rows as `start` gives them.
            stop: The first block that is not run; None for all of them.
        """
        model = self.model
        blocks = model.hf_model.get_submodule(model.family.text.blocks)
        repeats = len(residual) // self.inputs.batch
        stop = self.n_layers if stop is None else stop
        deepstack = model.wiring.deepstack
        visual = None if self.visual is None else _repeated(self.visual, self.inputs.batch, repeats)
        with model.registry.running_on(self.inputs), deepstack.holding(self._features(repeats), visual) as features:
            for index in range(layer, stop):
                residual = blocks[index](residual, **self._arguments(index, repeats))
                if index < len(features):
                    assert visual is not None
                    mask = visual.to(residual.device)
                    residual = residual.clone()
                    residual[mask] = residual[mask] + features[index].to(residual.device, residual.dtype)
        return residual

    @torch.no_grad()
    def logits(
        self, residual: Float[Tensor, "row pos d_model"], positions: Int[Tensor, "batch n"]
    ) -> Float[Tensor, "row n d_vocab"]:
        """Logits at some positions of each sample, from what leaves the last block."""
        model = self.model
        repeats = len(residual) // self.inputs.batch
        rows = positions.repeat_interleave(repeats, dim=0)
        late = ("ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits")
        with model.registry.running_on(self.inputs):
            if any(model.registry[name].active for name in late):  # their hooks expect every position
                return gather_logits(model.lm_head(model.ln_final(residual)), rows)
            return model.lm_head(model.ln_final(gather_logits(residual, rows)))

    def _features(self, repeats: int) -> list[Tensor]:
        """DeepStack's features for every row, in the order in which a mask of the rows takes them."""
        if not self.features or repeats == 1:
            return list(self.features)
        assert self.visual is not None
        counts = self.visual.sum(1).tolist()
        return [torch.cat([part.repeat(repeats, 1) for part in f.split(counts)]) for f in self.features]

    def _arguments(self, layer: int, repeats: int) -> dict[str, Any]:
        batch = self.inputs.batch
        if repeats == 1:
            return self.arguments[layer]
        return {name: _repeated(value, batch, repeats) for name, value in self.arguments[layer].items()}


def _repeated(value: Any, batch: int, repeats: int) -> Any:
    """An argument of a block for every row: what has the batch in front is repeated, everything else is shared."""
    if isinstance(value, tuple):
        return tuple(_repeated(v, batch, repeats) for v in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) not in (1, batch):
        return value
    if len(value) == 1:
        return value.expand(batch * repeats, *value.shape[1:])
    return value.repeat_interleave(repeats, dim=0)

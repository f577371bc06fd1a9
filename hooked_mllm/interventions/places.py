"""Which rows of an activation an intervention touches: prompt positions and generated tokens, with or without cache."""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.cache.activation_cache import Positions, positions
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, InputError, LayoutError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.interventions.base import check_choice


def check_places(wanted: Positions | None, phase: str, tower: str) -> None:
    """Refuse positions and phases that exclude each other.

    Raises:
        HookValueError: for an unknown phase or tower, positions of the prompt in decoding, or decoding in a vision
            tower.
        LayoutError: for named positions in a vision tower.
    """
    check_choice("phase", phase, ("prefill", "decode", "both"))
    check_choice("tower", tower, ("text", "vision"))
    if phase == "decode" and wanted is not None and wanted != "last":
        raise HookValueError(
            "Positions are those of the prompt, and phase='decode' acts on generated tokens alone: leave positions "
            "out, or take phase='prefill' or 'both'."
        )
    if tower != "text" and phase != "prefill":
        raise HookValueError(f"Images are encoded in the prefill alone: in the {tower} tower take phase='prefill'.")
    if tower != "text" and isinstance(wanted, str):
        raise LayoutError(
            f"Positions of the {tower} tower have no names: give indices, a mask or a slice instead of {wanted!r}."
        )


class Places:
    """The rows to act on, in whatever run goes on.

    Prompt positions are acted on in phases "prefill" and "both", generated tokens in "decode" and "both". That holds by
    position and not by call, so a generation without KV cache, which runs the whole sequence at every step, is treated
    as one with it.

    Args:
        model: The model that runs.
        wanted: Positions of the prompt; None for all.
        phase: "prefill", "decode" or "both".
        tower: "text" or another.
    """

    def __init__(self, model: Model, wanted: Positions | None, phase: str = "prefill", tower: str = "text") -> None:
        self.registry = model.registry
        self.wanted, self.phase, self.tower = wanted, phase, tower
        self._known: tuple[Any, Tensor] | None = None

    @property
    def running(self) -> Any:
        """The inputs of this run; None in a vision tower, whose positions are not those of the prompt."""
        return self.registry.running if self.tower == "text" else None

    @property
    def first(self) -> int:
        """The position of the first row of activations, above 0 where only the end of a prompt is run again."""
        return self.registry.first if self.tower == "text" else 0

    def prompt_length(self, length: int) -> int:
        """Positions of the prompt, for an activation of `length` positions."""
        return length if self.running is None else self.running.length

    def offset(self, length: int, step: int) -> int:
        """The position in the sequence of the first row of an activation of `length` positions."""
        prompt = self.prompt_length(length)
        if self.first:
            return self.first
        return 0 if step == 0 or length >= prompt + step else prompt + step - 1

    def rows(self, batch: int, length: int, hook: HookPoint, device: torch.device) -> Bool[Tensor, "batch pos"] | None:
        """True at the rows to act on; None where there is none.

        Raises:
            LayoutError: for positions that the run does not have.
        """
        prompt, step = self.prompt_length(length), hook.step
        whole = step == 0 or length >= prompt + step
        if (self.phase == "decode" and step == 0) or (self.phase == "prefill" and not whole):
            return None
        if self.first:
            return self.prompt(batch, prompt, device)[:, self.first : self.first + length]
        out = torch.zeros(batch, length, dtype=torch.bool, device=device)
        if self.phase != "decode" and whole:
            out[:, :prompt] = self.prompt(batch, prompt, device)[:, :length]
        if self.phase != "prefill" and step > 0:
            out[:, prompt if whole else 0 : prompt + step] = True
        return out

    def prompt(self, batch: int, length: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
        """True at the wanted positions of the prompt."""
        running = self.running
        if self._known is not None and running is not None and self._known[0] is running:
            known = self._known[1]
        else:
            known = self._resolve(running, batch, length).to(device)
            self._known = (running, known)
        known = known.to(device)
        # beams and several sequences of one prompt lie side by side
        return known if len(known) == batch else known.repeat_interleave(batch // len(known), dim=0)

    def _resolve(self, running: Any, batch: int, length: int) -> Tensor:
        rows = batch if running is None else running.batch
        if self.wanted is None:
            return torch.ones(rows, length, dtype=torch.bool)
        if running is not None and running.tensors.get("past_key_values") is not None:
            raise InputError(
                "Positions count from the start of the prompt, and these inputs go on from `past_key_values`: run the "
                "whole sequence, or use `model.generate`."
            )
        return as_mask(positions(self.wanted, rows, length, None if running is None else running.masks), length)


def first_position(wanted: Positions | None, inputs: Any) -> int:
    """The first of the wanted positions in any sample of the inputs; 0 for all."""
    if wanted is None:
        return 0
    index = positions(wanted, inputs.batch, inputs.length, inputs.masks)
    return int(index[index >= 0].min())


def as_mask(index: Tensor, length: int) -> Bool[Tensor, "batch pos"]:
    """Indices `[batch n]`, -1 for none, as a mask."""
    mask = torch.zeros(len(index), length + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(index < 0, length, index), True)
    return mask[:, :-1]

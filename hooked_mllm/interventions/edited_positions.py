"""Which positions of an activation an intervention edits: of the prompt and of generated tokens, in every run."""

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.contracts import Model, Tower
from hooked_mllm.errors import HookValueError, LayoutError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.hooks.run_context import Run
from hooked_mllm.inputs.positions import Positions, check_positions, is_token_kind, resolve_mask
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.interventions.base import Intervention, check_choice


def check_edited_positions(selected: Positions | None, phase: str, tower: str) -> None:
    """Reject positions and phases that exclude each other."""
    check_choice("phase", phase, ("prefill", "decode", "both"))
    check_choice("tower", tower, ("text", "vision"))
    if selected is not None:
        check_positions(selected)
    is_last = isinstance(selected, str) and selected == "last"
    if phase == "decode" and selected is not None and not is_last:
        raise HookValueError(
            "Positions are those of the prompt, and phase='decode' acts on generated tokens alone: leave positions "
            "out, or take phase='prefill' or 'both'."
        )
    if tower != "text" and phase != "prefill":
        raise HookValueError(f"Images are encoded in the prefill alone: in the {tower} tower take phase='prefill'.")
    if tower != "text" and is_token_kind(selected):
        raise LayoutError(
            f"Positions of the {tower} tower have no names: give indices, a mask or a slice instead of {selected!r}; "
            "`model.vision_positions(sample, region)` is the mask of a region."
        )


class PositionIntervention(Intervention):
    """An intervention at prompt positions of a tower; None for all."""

    tower: Tower
    positions: Positions | None

    def first_position(self, model: Model, inputs: ResolvedInput) -> int:
        """The first prompt position that it may change in any sample; 0 in a vision tower."""
        if self.tower != "text" or self.positions is None:
            return 0
        return int(inputs.mask(self.positions).any(0).int().argmax())


def for_batch(mask: Bool[Tensor, "sample pos"], batch: int) -> Bool[Tensor, "batch pos"]:
    """A mask for all rows; beams and several sequences of one prompt are adjacent."""
    return mask if len(mask) == batch else mask.repeat_interleave(batch // len(mask), dim=0)


class EditedPositions:
    """The positions that an intervention edits in the current run: of the prompt, and of generated tokens.

    Phases select by position and not by call, so that generation without KV cache, which runs the whole sequence at
    every step, is edited at the same positions as one with it.
    """

    def __init__(self, model: Model, selected: Positions | None, phase: str = "prefill", tower: str = "text") -> None:
        self.registry = model.registry
        self.selected, self.phase, self.tower = selected, phase, tower
        self._resolved: tuple[ResolvedInput, Tensor] | None = None

    @property
    def inputs(self) -> ResolvedInput | None:
        """The inputs of this run; None in a vision tower, whose positions are not those of the prompt."""
        return self.registry.running if self.tower == "text" else None

    @property
    def run(self) -> Run | None:
        """The run in progress; None in a vision tower."""
        return self.registry.context.run if self.tower == "text" else None

    def prompt_length(self, length: int) -> int:
        """Positions of the prompt, for an activation of `length` positions."""
        if self.run is not None and self.run.prompt_length is not None:
            return self.run.prompt_length
        return length if self.inputs is None else self.inputs.length

    def offset(self, length: int) -> int:
        """The position in the sequence of the first row of an activation of `length` positions."""
        run = self.run
        if run is None:
            return 0
        # rows end where the call does: logits may be of the last ones only, rotated keys are of the whole sequence
        return run.first if run.rows is None else max(0, run.first + run.rows - length)

    def mask(self, batch: int, length: int, hook: HookPoint, device: torch.device) -> Bool[Tensor, "batch pos"] | None:
        """True at the positions of an activation that are edited; None where its phase excludes all."""
        prompt, offset = self.prompt_length(length), self.offset(length)
        n_prompt = min(max(prompt - offset, 0), length)  # rows of the prompt, which come first
        if n_prompt == (0 if self.phase == "prefill" else length if self.phase == "decode" else -1):
            return None
        mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        if self.phase != "decode" and n_prompt:
            mask[:, :n_prompt] = self.prompt_mask(batch, prompt, device)[:, offset : offset + n_prompt]
        if self.phase != "prefill":
            mask[:, n_prompt:] = True
        return mask

    def prompt_mask(self, batch: int, length: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
        """True at the selected positions of the prompt."""
        inputs = self.inputs
        if self._resolved is not None and inputs is not None and self._resolved[0] is inputs:
            mask = self._resolved[1].to(device)
        else:
            mask = self._resolve(inputs, batch, length).to(device)
            self._resolved = None if inputs is None else (inputs, mask)
        return for_batch(mask, batch)

    def _resolve(self, inputs: ResolvedInput | None, batch: int, length: int) -> Bool[Tensor, "sample pos"]:
        batch = batch if inputs is None else inputs.batch
        if self.selected is None:
            return torch.ones(batch, length, dtype=torch.bool)
        if inputs is not None and inputs.is_part and is_token_kind(self.selected):  # of a prompt, behind a KV cache
            return inputs.part_mask(self.selected, self.offset(inputs.length), length)
        return resolve_mask(self.selected, batch, length, None if inputs is None else inputs.host_masks)

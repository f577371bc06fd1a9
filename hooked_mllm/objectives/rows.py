"""Rows of the logits: which an objective reads, taken out of all logits or computed alone."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.positions import Positions, check_every_sample
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput


def positions_of(inputs: ResolvedInput, wanted: Positions) -> Int[Tensor, "batch n"]:
    """The positions that an objective reads, as indices; -1 where a sample has fewer than the others.

    Args:
        inputs: Whole sequences.
        wanted: Positions of the prompt.

    Raises:
        InputError: for inputs that continue from `past_key_values`, or "generating" without an answer.
        LayoutError: for positions that the inputs do not have, or a sample without any.
    """
    inputs.check_whole()
    index = inputs.positions(wanted)
    check_every_sample((index >= 0).any(1), wanted)
    return index


def gather_logits(
    logits: Float[Tensor, "batch pos d_vocab"], positions: Int[Tensor, "rows n"]
) -> Float[Tensor, "batch n d_vocab"]:
    """The rows of logits at positions of each sample; zeros where the position is -1.

    Args:
        logits: Logits of all positions.
        positions: One row a sample, counted in the padded sequence.

    Raises:
        InputError: for positions of another batch, or outside the sequence.

    Examples:
        >>> logits = torch.arange(6.0).view(1, 3, 2)
        >>> gather_logits(logits, torch.tensor([[2, -1]])).tolist()
        [[[4.0, 5.0], [0.0, 0.0]]]
    """
    if len(positions) != len(logits):
        raise InputError(f"Expected positions of {len(logits)} samples, one row each; got {len(positions)} rows.")
    if positions.numel() and not -1 <= int(positions.min()) <= int(positions.max()) < logits.shape[1]:
        raise InputError(
            f"These positions run from {int(positions.min())} to {int(positions.max())}, the logits have "
            f"{logits.shape[1]}. They count in the padded sequence, and -1 stands for none: give the logits of the "
            "whole sequence."
        )
    none = positions < 0
    index = positions.clamp(min=0).to(logits.device)
    rows = logits[torch.arange(len(logits), device=logits.device)[:, None], index]
    return rows.masked_fill(none[..., None].to(logits.device), 0.0) if bool(none.any()) else rows


def logits_at(
    model: Model, inputs: ModelInput | ResolvedInput, positions: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch n d_vocab"]:
    """One forward pass that unembeds only these positions of each sample; zeros where the position is -1.

    Hooks and interventions that hang on the model act as in any forward pass, and gradients flow if they are enabled.

    Raises:
        InputError: for positions of another batch, or outside the sequence.

    Examples:
        >>> from hooked_mllm import HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> logits_at(model, sample, torch.tensor([[len(sample) - 1]])).shape == (1, 1, model.cfg.d_vocab)
        True
    """
    resolved = inputs if isinstance(inputs, ResolvedInput) else model.resolve(inputs)
    low, high = (int(positions.min()), int(positions.max())) if positions.numel() else (0, -1)
    if len(positions) != resolved.batch or not -1 <= low <= high < resolved.length:
        raise InputError(
            f"Expected positions [{resolved.batch} n] from 0 to {resolved.length - 1} (or -1 for none); got "
            f"{tuple(positions.shape)} from {low} to {high}."
        )
    # `labels` would be compared with the few rows that are left
    tensors = {k: v for k, v in resolved.tensors.items() if k not in ("labels", "logits_to_keep")}
    # one index for the whole batch: early transformers 5 takes no row of positions for each sample
    at = positions.cpu()
    kept = at[at >= 0].unique()
    # numbers and no tensor: of a model on several devices, transformers would have it on another than the states
    logits = model.run(replace(resolved, tensors=tensors), logits_to_keep=kept.tolist())
    return gather_logits(logits, torch.searchsorted(kept, at).masked_fill(at < 0, -1))


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in which sums over a vocabulary keep their digits."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

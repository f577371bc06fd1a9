"""The logits that an objective reads: selected from all logits, or computed alone."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.positions import Positions, check_every_sample
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput


def logit_positions(inputs: ResolvedInput, selected: Positions) -> Int[Tensor, "batch n"]:
    """Positions of whole sequences as indices, at least one in each sample; -1 where a sample has fewer than others."""
    inputs.check_whole()
    index = inputs.positions(selected)
    check_every_sample((index >= 0).any(1), selected)
    return index


@checked
def gather_logits(
    logits: Float[Tensor, "batch pos d_vocab"], positions: Int[Tensor, "sample n"]
) -> Float[Tensor, "batch n d_vocab"]:
    """The logits at positions of each sample in the padded sequence; zeros where the position is -1.

    Raises:
        InputError: For positions of another batch, or outside the sequence.

    Examples:
        >>> logits = torch.arange(6.0).view(1, 3, 2)
        >>> gather_logits(logits, torch.tensor([[2, -1]])).tolist()
        [[[4.0, 5.0], [0.0, 0.0]]]
    """
    _check_range(positions, *logits.shape[:2])
    absent = positions < 0
    index = positions.clamp(min=0).to(logits.device)
    # [batch pos d_vocab] -> [batch n d_vocab]
    selected = logits[torch.arange(len(logits), device=logits.device)[:, None], index]
    return selected.masked_fill(absent[..., None].to(logits.device), 0.0) if bool(absent.any()) else selected


@checked
def logits_at(
    model: Model, inputs: ModelInput | ResolvedInput, positions: Int[Tensor, "batch n"]
) -> Float[Tensor, "batch n d_vocab"]:
    """One forward pass that unembeds only these positions of each sample; zeros where the position is -1.

    Registered hooks and interventions apply as in any forward pass, and gradients flow if they are enabled.

    Raises:
        InputError: For positions of another batch, or outside the sequence.

    Examples:
        >>> from hooked_mllm import HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> logits_at(model, sample, torch.tensor([[len(sample) - 1]])).shape == (1, 1, model.cfg.d_vocab)
        True
    """
    resolved = inputs if isinstance(inputs, ResolvedInput) else model.resolve(inputs)
    _check_range(positions, resolved.batch, resolved.length)
    # without labels, which have one entry for each position of the whole sequence
    tensors = {k: v for k, v in resolved.tensors.items() if k not in ("labels", "logits_to_keep")}
    kept, index = kept_positions(positions)
    logits = model.run(replace(resolved, tensors=tensors), logits_to_keep=kept)
    return gather_logits(logits, index)


def kept_positions(positions: Int[Tensor, "batch n"]) -> tuple[list[int], Int[Tensor, "batch n"]]:
    """The argument `logits_to_keep` of transformers, and the index of each position in the logits, -1 for none."""
    positions = positions.cpu()
    # for all samples, as early transformers 5 supports no positions by sample; a list, as transformers would place a
    # tensor on another device than the states of a model on several devices
    kept = positions[positions >= 0].unique()
    return kept.tolist(), torch.searchsorted(kept, positions).masked_fill(positions < 0, -1)


def _check_range(positions: Int[Tensor, "sample n"], batch: int, length: int) -> None:
    """Raise for positions of another batch, or outside the sequence."""
    low, high = (int(positions.min()), int(positions.max())) if positions.numel() else (-1, -1)
    if len(positions) != batch or not -1 <= low <= high < length:
        raise InputError(
            f"Expected positions [{batch} n] from 0 to {length - 1}, or -1 for none, in the padded sequence; got "
            f"{list(positions.shape)} from {low} to {high}."
        )


def at_least_float32(logits: Tensor) -> Tensor:
    """Values in float32 or float64: sums over a vocabulary lose digits in narrower types."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def log_probabilities(logits: Tensor) -> Tensor:
    """The logarithm of the softmax over the vocabulary, in float32 or float64."""
    return at_least_float32(logits).log_softmax(-1)

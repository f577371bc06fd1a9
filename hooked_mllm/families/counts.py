"""Counts of placeholder tokens, tiles and blocks that several families need."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mllm.errors import InputError

#: ranges (start, stop) of rows of a vision tower
Rows = list[tuple[int, int]]


def share_out(sizes: Sequence[int], units: Sequence[int], token_counts: Sequence[int], start: int = 0) -> list[Rows]:
    """Assign consecutive images to samples, until each sample has a token for each placeholder of its prompt.

    `sizes` are rows of each image, `units` its tokens; the first image starts at the row `start`.
    """
    image, out = 0, []
    for count in token_counts:
        sample_start, missing = start, count
        while missing > 0 and image < len(sizes):
            missing, start, image = missing - units[image], start + sizes[image], image + 1
        if missing:
            raise InputError(
                f"Images of {list(units)} tokens do not fill prompts with {list(token_counts)} placeholders: pass the "
                "images of exactly these prompts, in their order."
            )
        out.append([(sample_start, start)] if start > sample_start else [])
    return out


def depth_of_states(layers: int | Sequence[int], n_blocks: int) -> int:
    """Number of blocks that compute `hidden_states[layer]` of a tower, of one layer or of the last of several."""
    indices = [layers] if isinstance(layers, int) else list(layers)
    return max(i + n_blocks + 1 if i < 0 else i for i in indices)


def counts_of(input_ids: Int[Tensor, "batch pos"], token: int) -> list[int]:
    """Number of positions of each sample that hold `token`."""
    return (input_ids == token).sum(1).tolist()


def placeholder_count(input_ids: Int[Tensor, "..."], ids: tuple[int, ...]) -> int:
    """Number of positions of `input_ids` that hold one of `ids`."""
    return int(torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)).sum())

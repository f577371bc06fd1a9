"""Masks in numbers: which heads stream, and where each sequence begins and ends."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mllm.errors import HeadError
from hooked_mllm.kernels.streaming_window import check_sink_and_window, head_flags


@dataclass(frozen=True)
class StreamingHeads:
    """The heads of a layer that see a sink and a window; the dense ones see everything that the mask shows."""

    dense: tuple[int, ...]
    n_heads: int
    sink: int
    window: int

    def __post_init__(self) -> None:
        if any(not 0 <= head < self.n_heads for head in self.dense):
            raise HeadError(f"Dense heads {list(self.dense)} are out of range: heads are 0 to {self.n_heads - 1}.")
        check_sink_and_window(self.sink, self.window)

    def flags(self, device: torch.device | str) -> Bool[Tensor, " head"]:
        """True at the dense heads."""
        return head_flags(self.dense, self.n_heads, device)


@dataclass(frozen=True)
class CausalBounds:
    """A causal mask in numbers: query i is at key p = i + offset and sees key j iff `start <= j <= p`, `j < end`."""

    offset: int
    start: Int[Tensor, " batch"] | None = None
    end: Int[Tensor, " batch"] | None = None

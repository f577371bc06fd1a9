"""Running the end of a sequence alone: keys, values and masks of its beginning, taken from a run that is recorded."""

from typing import Any

import torch
from torch import Tensor

from hooked_mllm.attention.site import AttentionCall


class Prefix:
    """Stands where transformers puts a KV cache, for one block and one call.

    Args:
        call: What the block's attention was called with in the recorded run.
        first: Keys before this position are taken from it.
        repeats: Rows of a sample.
    """

    def __init__(self, call: AttentionCall, first: int, repeats: int) -> None:
        self.call, self.first, self.repeats = call, first, repeats

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence: `[row kv_head key d_head]`."""
        return self._joined(self.call.k, key), self._joined(self.call.v, value)

    def _joined(self, recorded: Tensor, new: Tensor) -> Tensor:
        begin = recorded[:, :, : self.first].repeat_interleave(self.repeats, dim=0)
        return torch.cat([begin.to(new.device), new], dim=2)


def suffix_mask(call: AttentionCall, first: int, implementation: str) -> Tensor:
    """The rows of a mask from `first` on, as an attention implementation takes them: `[batch 1 query key]`.

    Args:
        call: What the block's attention was called with.
        first: The first query.
        implementation: "sdpa" (boolean) or "eager" (additive).
    """
    rows = call.mask
    index = torch.arange(first, rows.q_length, device=rows.device).expand(rows.batch, -1)
    visible = rows.rows(index)
    visible = (visible | ~visible.any(-1, keepdim=True))[:, None]  # padding that sees nothing would become NaN
    if implementation == "sdpa":
        return visible
    hidden = torch.finfo(call.k.dtype).min
    return torch.zeros(visible.shape, dtype=call.k.dtype, device=visible.device).masked_fill(~visible, hidden)

"""The end of a sequence alone: keys, values and masks of its beginning are those of a recorded run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_mllm.attention.site import AttentionCall


@dataclass
class Prefix:
    """A KV cache for one call of a block: recorded keys and values before position `first`, `repeats` per sample."""

    call: AttentionCall
    first: int
    repeats: int

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence: `[row kv_head key d_head]`."""
        return self._joined(self.call.k, key), self._joined(self.call.v, value)

    def _joined(self, recorded: Tensor, new: Tensor) -> Tensor:
        # [batch kv_head key d_head] -> [row kv_head first d_head]
        prefix = recorded[:, :, : self.first].repeat_interleave(self.repeats, dim=0)
        return torch.cat([prefix.to(new.device), new], dim=2)


def suffix_mask(call: AttentionCall, first: int, implementation: str) -> Tensor:
    """The mask of the queries from `first` on, boolean for "sdpa" and additive for "eager": `[batch 1 query key]`."""
    mask = call.mask
    queries = torch.arange(first, mask.q_length, device=mask.device).expand(mask.batch, -1)  # [batch query]
    visible = mask.rows(queries)  # [batch query key]
    # padding that attends to nothing would become NaN
    visible = (visible | ~visible.any(-1, keepdim=True))[:, None]
    if implementation == "sdpa":
        return visible
    hidden = torch.finfo(call.k.dtype).min
    return torch.zeros(visible.shape, dtype=call.k.dtype, device=visible.device).masked_fill(~visible, hidden)

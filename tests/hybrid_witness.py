"""Hybrid attention written out key by key, in an unwrapped model with eager attention."""

from functools import lru_cache

import torch
from eager_reference import Reference
from torch import Tensor

SINK, WINDOW = 2, 5
#: dense query heads by layer: none, one, and both of one group with one of the other
DENSE = {1: (2,), 2: (0, 1, 3)}


@lru_cache(maxsize=256)
def near(
    n_heads: int, dense: tuple[int, ...], queries: range, kv_length: int, start: tuple[int, ...], sink: int, window: int
) -> Tensor:
    """[batch head query key]: True where a causal head may look; `start` is the first real key of each sample."""
    seen = torch.zeros(len(start), n_heads, len(queries), kv_length, dtype=torch.bool)
    for b, first in enumerate(start):
        for h in range(n_heads):
            for i, place in enumerate(queries):
                seen[b, h, i, : first + sink] = True
                seen[b, h, i, 0 if h in dense else max(0, place - window + 1) :] = True
    return seen


class HybridReference(Reference):
    """The reference of eager attention, whose prefill hides what streaming heads do not see before any edit."""

    def __init__(self, family: str, dense=None, sink: int = SINK, window: int = WINDOW) -> None:
        super().__init__(family)
        self.dense, self.sink, self.window = DENSE if dense is None else dense, sink, window
        self.text = {self.module("text", layer): layer for layer in range(3)}
        self.start: tuple[int, ...] = ()

    def _attention(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        q_length, kv_length = query.shape[2], key.shape[2]
        if module in self.text and q_length > 1:
            offset = kv_length - q_length
            start, dense = self.start or (0,) * len(query), self.dense.get(self.text[module], ())
            places = range(offset, offset + q_length)
            seen = near(query.shape[1], dense, places, kv_length, start, self.sink, self.window)
            lowest = torch.finfo(query.dtype).min
            attention_mask = (attention_mask + torch.zeros(seen.shape)).masked_fill(~seen, lowest)
        return super()._attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)

    def on(self, inputs) -> "HybridReference":
        """The same, its sinks counted from the first real token of each of these samples."""
        self.start = tuple(inputs["attention_mask"].argmax(1).tolist())
        return self

"""Hybrid attention written out key by key, in an unwrapped model with eager attention."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from helpers.eager_reference import Reference

Dense = Mapping[int, tuple[int, ...]]
Start = tuple[int, ...]

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


def hidden_from_heads(
    mask: Tensor, query: Tensor, key: Tensor, dense: Dense, layer: int, start: Start, sink: int, window: int
) -> Tensor:
    """An additive causal mask `[batch 1 query key]` as that of each head; the last query stands at the last key."""
    n, m = query.shape[2], key.shape[2]
    heads = tuple(sorted(dense.get(layer, ())))
    seen = near(query.shape[1], heads, range(m - n, m), m, start or (0,) * len(query), sink, window)
    return (mask + torch.zeros(seen.shape)).masked_fill(~seen, torch.finfo(mask.dtype).min)


class HybridReference(Reference):
    """The reference of eager attention, whose prefill hides what streaming heads do not see before any edit."""

    def __init__(self, family: str, dense: Dense = DENSE, sink: int = SINK, window: int = WINDOW) -> None:
        super().__init__(family)
        self.dense, self.sink, self.window = dense, sink, window
        self.text = {self.module("text", layer): layer for layer in range(3)}
        self.start: Start = ()

    def _attention(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        if module in self.text and query.shape[2] > 1:
            settings = (self.dense, self.text[module], self.start, self.sink, self.window)
            attention_mask = hidden_from_heads(attention_mask, query, key, *settings)
        return super()._attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)

    def on(self, inputs) -> "HybridReference":
        """The same, its sinks counted from the first real token of each of these samples."""
        self.start = tuple(inputs["attention_mask"].argmax(1).tolist())
        return self


@contextmanager
def written_out(modules: list[nn.Module], dense: Dense, start: Start, sink: int, window: int) -> Iterator[None]:
    """Within it, the eager attention of these layers of a model hides in a prompt what each head is not to see."""
    layers = {module: number for number, module in enumerate(modules)}
    file: Any = sys.modules[type(modules[0]).__module__]
    eager = file.eager_attention_forward

    def attention(module, query, key, value, attention_mask, **kwargs):
        if module in layers and query.shape[2] > 1:
            attention_mask = hidden_from_heads(attention_mask, query, key, dense, layers[module], start, sink, window)
        return eager(module, query, key, value, attention_mask, **kwargs)

    with patch.object(file, "eager_attention_forward", attention):
        yield


def keep_half_of_the_heads(layers):
    """What tensor parallelism leaves in the second of two processes: some heads, numbered from 0."""
    for layer in layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            whole = getattr(attention, name)
            part = torch.nn.Linear(whole.in_features, whole.out_features // 2, bias=whole.bias is not None)
            part.weight = torch.nn.Parameter(whole.weight.chunk(2)[1])
            setattr(attention, name, part)
        attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight.chunk(2, dim=1)[1])

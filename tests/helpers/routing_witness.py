"""Random queries and keys, and their lost attention by loops in NumPy."""

import numpy as np
import torch

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.routing import QueryAwareHeads

SINK, WINDOW = 3, 5


def witness(q, k, rows, place, start, scale=0.3, sink=SINK, window=WINDOW, order=1):
    """Lost attention of one sample by loops: `rows` of q [head query d], standing at `place`, keys from `start` on."""
    q, k = (x.double().numpy() for x in (q, k))
    group, out = len(q) // len(k), np.zeros(len(q))
    for head in range(len(q)):
        for i, p in zip(rows, place, strict=True):
            a = np.exp(scale * k[head // group, start : p + 1] @ q[head, i])
            a /= a.sum()
            j = np.arange(start, p + 1)
            far = (j >= start + sink) & (j <= p - window)
            out[head] += (a[far] ** order).sum() ** (1 / order) / len(rows)
    return out


def tensors(heads=4, kv_heads=2, q_length=40, kv_length=40, batch=1, d=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_length, d, generator=draw)
    k = torch.randn(batch, kv_heads, kv_length, d, generator=draw)
    return 2 * q, 2 * k, MaskRows(batch, q_length, kv_length, "cpu", causal=True)


def padded(batch, length, spans):
    padding = torch.zeros(batch, length, dtype=torch.bool)
    for row, (start, end) in zip(padding, spans, strict=True):
        row[start:end] = True
    return MaskRows(batch, length, length, "cpu", causal=True, padding=padding)


def policy(budget, layers=3, **settings):
    made = QueryAwareHeads(budget, **{"sink": SINK, "window": WINDOW, "queries": 6, **settings})
    made.validate(layers, 4)
    return made

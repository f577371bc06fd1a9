"""Random inputs of hybrid attention, and its definition as a loop in NumPy."""

import numpy as np
import torch

from helpers.triton_interpreter import DEVICE

#: small tiles, so that short sequences have many; the interpreter takes no register limit
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, "maxnreg": None}


def tensors(batch, heads, kv, q_length, kv_length, d, dtype=torch.float32, seed=0):
    """q, k, v with the strides of transformers: `[batch head pos d]`, views of `[batch pos head d]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((q_length, heads), (kv_length, kv), (kv_length, kv))
    made = [torch.randn(batch, n, h, d, generator=generator).to(DEVICE, dtype) for n, h in shapes]
    return [x.transpose(1, 2) for x in made]


def in_numpy(q, k, v, dense, sink, window, scale, start, end):
    """The definition again, a loop over rows in float64."""
    q, k, v = (x.detach().double().cpu().numpy() for x in (q, k, v))
    batch, heads, rows, _ = q.shape
    length, groups = k.shape[2], heads // k.shape[1]
    z, lse = np.zeros_like(q), np.full((batch, heads, rows), -np.inf)
    for b, h, i in np.ndindex(batch, heads, rows):
        place = i + length - rows
        keys = [
            j
            for j in range(start[b], min(end[b], place + 1))
            if h in dense or j < start[b] + sink or j > place - window
        ]
        if keys:
            scores = k[b, h // groups, keys] @ q[b, h, i] * scale
            lse[b, h, i] = np.logaddexp.reduce(scores)
            z[b, h, i] = np.exp(scores - lse[b, h, i]) @ v[b, h // groups, keys]
    return torch.from_numpy(z), torch.from_numpy(lse)


def bounds(length, padded):
    """First and last keys of two sequences, one padded on the right, the other on the left."""
    start = torch.tensor([0, length // 3], dtype=torch.int32, device=DEVICE)
    end = torch.tensor([length - length // 5, length], dtype=torch.int32, device=DEVICE)
    return (start, end) if padded else (torch.zeros_like(start), torch.full_like(end, length))


def flags(dense, heads):
    found = torch.zeros(heads, dtype=torch.bool, device=DEVICE)
    found[list(dense)] = True
    return found

"""Random layers of which attention profiles are taken, by torch, by the kernel and by a loop in NumPy."""

import numpy as np
import torch

from helpers.triton_interpreter import DEVICE
from hooked_mllm.kernels.attention_profile import naive_attention_profile
from hooked_mllm.kernels.attention_profile.launch import triton_attention_profile

#: small tiles, so that short sequences have many
SMALL = {"ROWS": 32, "N": 16, "num_warps": 4, "num_stages": 2}


class Case:
    """Random layers with the strides of transformers, views of `[batch pos head d]`, and question tokens."""

    def __init__(self, batch, heads, kv, queries, keys, d, *, layers=2, padded=False, streaming=None, uneven=False,
                 dtype=torch.float32, sharpness=1.0, seed=0):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def rows(n, h):
            made = sharpness * torch.randn(batch, n, h, d, generator=generator)
            return made.to(DEVICE, dtype).transpose(1, 2)

        self.q = [rows(queries, heads) for _ in range(layers)]
        self.k = [rows(keys, kv) for _ in range(layers)]
        self.scale = [d**-0.5 * (1 + 0.5 * layer) for layer in range(layers)]
        start, end = torch.zeros(batch, dtype=torch.long), torch.full((batch,), keys)
        if padded:  # on the left of one sample, on the right of the next
            start[::2], end[1::2] = keys // 3, keys - keys // 4
        counts = [max(1, queries - 2 * sample) if uneven else queries for sample in range(batch)]
        self.places = torch.zeros(batch, queries, dtype=torch.long)
        self.weight = torch.zeros(batch, queries)
        for sample, count in enumerate(counts):
            low, high = int(start[sample]), int(end[sample])
            some = torch.randperm(high - low, generator=generator)[:count].sort().values + low
            self.places[sample] = torch.cat([some, some[-1:].expand(queries - len(some))])
            self.weight[sample, : len(some)] = 1 / len(some)
        self.start, self.end = start, end
        self.bounds = {"start": start, "end": end} if padded else {"start": None, "end": None}
        self.streaming = [streaming if layer % 2 == 0 else None for layer in range(layers)]

    def naive(self):
        many = (len(self.q), len(self.places))
        wide = [[x.double() for x in some] for some in (self.q, self.k)]
        rest = (self.places, self.weight, self.start.expand(many), self.end.expand(many))
        rest = [x.to(DEVICE) for x in rest]
        return naive_attention_profile(*wide, self.scale, *rest, self.streaming).cpu()

    def kernel(self, config=SMALL, splits=None):
        shape = (len(self.q), *self.q[0].shape[:2], self.k[0].shape[2])
        out = torch.full(shape, torch.nan, device=DEVICE)
        moved = [None if b is None else b.to(DEVICE) for b in self.bounds.values()]
        made = triton_attention_profile(
            self.q, self.k, self.scale, self.places.to(DEVICE), self.weight.to(DEVICE), *moved, self.streaming,
            config, out, splits,
        )  # fmt: skip
        assert made is out
        return out.cpu()

    def numpy(self):
        """The definition again, a loop over rows in float64."""
        out = np.zeros((len(self.q), *self.q[0].shape[:2], self.k[0].shape[2]))
        group = self.q[0].shape[1] // self.k[0].shape[1]
        for layer, batch, head in np.ndindex(out.shape[:3]):
            q, k = self.q[layer][batch, head].double(), self.k[layer][batch, head // group].double()
            dense, sink, window = self.streaming[layer] or (range(99), 0, 1)
            for i, place in enumerate(self.places[batch].tolist()):
                start, end = int(self.start[batch]), int(self.end[batch])
                keys = [
                    j
                    for j in range(start, min(end, place + 1))
                    if head in dense or j < start + sink or j > place - window
                ]
                if keys:
                    scores = (k[keys] @ q[i]).cpu().numpy() * self.scale[layer]
                    row = np.exp(scores - np.logaddexp.reduce(scores))
                    out[layer, batch, head, keys] += row * float(self.weight[batch, i])
        return torch.from_numpy(out)

"""Attention in plain float64 NumPy, written from its definition, and random layers to compare with."""

from dataclasses import dataclass

import numpy as np
import torch

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.measuring.attention_view import AttentionView


def softmax_attention(q: np.ndarray, k: np.ndarray, visible: np.ndarray, scale: float) -> np.ndarray:
    """[batch head pos d] and [batch kv_head pos d], visible [batch query key] -> [batch head query key]."""
    batch, heads, n, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros((batch, heads, n, n))
    for b in range(batch):
        for h in range(heads):
            logits = scale * q[b, h].astype(np.float64) @ k[b, h // group].astype(np.float64).T
            for i in range(n):
                keys = np.flatnonzero(visible[b, i])
                if len(keys):
                    weights = np.exp(logits[i, keys] - logits[i, keys].max())
                    out[b, h, i, keys] = weights / weights.sum()
    return out


@dataclass
class Layers:
    """Random layers of one forward pass, and their attention as the reference computes it."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    mask: list[MaskRows]
    scale: list[float]
    masks: dict[str, torch.Tensor]
    attention: np.ndarray  # [layer batch head query key]

    @property
    def n_layers(self) -> int:
        return len(self.q)

    def view(self, layers: range | None = None, samples: slice = slice(None), **options) -> AttentionView:
        """Some layers (all by default) of some samples as a view."""
        layers = range(self.n_layers) if layers is None else layers
        chosen = slice(layers.start, layers.stop)
        masks = {name: mask[samples] for name, mask in self.masks.items()}
        rows = [_samples(mask, samples) for mask in self.mask[chosen]]
        q, k = ([t[samples] for t in tensors[chosen]] for tensors in (self.q, self.k))
        return AttentionView(layers, q, k, rows, self.scale[chosen], masks.__getitem__, self.n_layers, **options)

    def profile(self, queries: str) -> np.ndarray:
        """[layer batch head key]: the mean row over the query tokens."""
        return np.stack(
            [self.attention[:, b][:, :, mask].mean(2) for b, mask in enumerate(self.masks[queries].numpy())], axis=1
        )


def _samples(mask: MaskRows, samples: slice) -> MaskRows:
    padding = None if mask.padding is None else mask.padding[samples]
    batch = len(range(mask.batch)[samples])
    return MaskRows(batch, mask.q_length, mask.kv_length, "cpu", causal=True, window=mask.window, padding=padding)


def random_layers(
    *,
    seed: int = 0,
    n_layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    d_head: int = 8,
    lengths: tuple[int, ...] = (23,),
    padding_side: str = "left",
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 2.0,
    one_scale: bool = False,
) -> Layers:
    """Layers with samples of the given lengths; layers 1, 3, ... have a sliding window if one is given.

    Sample b, counted from its own first token: visual tokens 2..8, target 4..6 (b even) or 3 and 7 (b odd), question
    the 4 + b tokens before the last one, answer the last token.
    """
    generator = torch.Generator().manual_seed(seed)
    n, batch = max(lengths), len(lengths)
    q = [sharpness * torch.randn(batch, n, heads, d_head, generator=generator).to(dtype) for _ in range(n_layers)]
    k = [torch.randn(batch, n, kv_heads, d_head, generator=generator).to(dtype) for _ in range(n_layers)]
    q, k = ([t.transpose(1, 2) for t in tensors] for tensors in (q, k))  # not contiguous, as in a model
    names = ("padding", "question", "answer", "last", "target", "visual")
    masks = {name: torch.zeros(batch, n, dtype=torch.bool) for name in names}
    for b, length in enumerate(lengths):
        start = n - length if padding_side == "left" else 0
        end = start + length
        masks["padding"][b] = True
        masks["padding"][b, start:end] = False
        masks["visual"][b, start + 2 : start + 9] = True
        masks["target"][b, [start + 4, start + 5, start + 6] if b % 2 == 0 else [start + 3, start + 7]] = True
        masks["question"][b, end - 5 - b : end - 1] = True
        masks["answer"][b, end - 1] = True
        masks["last"][b, end - 2] = True
    real = ~masks["padding"]
    shared = {
        w: MaskRows(batch, n, n, "cpu", causal=True, window=w, padding=None if bool(real.all()) else real)
        for w in {None, window}
    }
    mask = [shared[window if layer % 2 else None] for layer in range(n_layers)]
    scale = [d_head**-0.5 * (1 if one_scale else 1 + 0.25 * layer) for layer in range(n_layers)]
    attention = []
    for layer in range(n_layers):
        i, j = np.arange(n)[:, None], np.arange(n)[None, :]
        visible = (j <= i) & (real.numpy()[:, None, :]) & (real.numpy()[:, :, None])
        if layer % 2 and window is not None:
            visible &= j > i - window
        attention.append(softmax_attention(q[layer].float().numpy(), k[layer].float().numpy(), visible, scale[layer]))
    return Layers(q, k, mask, scale, masks, np.stack(attention))


CASES = {
    "one-sample": {},
    "one-scale": {"one_scale": True},
    "multi-head": {"heads": 3, "kv_heads": 3},
    "multi-query": {"heads": 6, "kv_heads": 1, "d_head": 5},
    "left-padded": {"lengths": (23, 17, 20), "padding_side": "left"},
    "right-padded": {"lengths": (23, 17, 20), "padding_side": "right"},
    "sliding-window": {"window": 5, "n_layers": 4},
    "windows-and-padding": {"window": 7, "n_layers": 3, "lengths": (19, 31), "padding_side": "left"},
}
# scratch memory in bytes -> everything at once, some layers, one key head, one query at a time
BUDGETS = [1 << 30, 40_000, 4_000, 1]

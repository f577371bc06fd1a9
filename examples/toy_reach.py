"""The local attention mask and the head dropout of a toy in training."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Reach:
    """The text attention of the current step: a local mask for all but the planted heads, and head dropout.

    Each head except the planted ones is dropped with probability `dropout`. In a fraction `layer_dropout` of the
    samples, one layer loses all of them. In a fraction `planted_dropout`, planted heads are dropped, each with
    probability 1/2, but never all.

    Args:
        n_heads: Heads per layer.
        planted: The planted heads, as (layer, head).
    """

    def __init__(self, n_heads: int, planted: tuple[tuple[int, int], ...]) -> None:
        self.n_heads, self.planted = n_heads, planted
        self.window: int | None = None
        self.dropout = self.layer_dropout = self.planted_dropout = 0.0
        self.bare_layer = torch.empty(0)  # [sample]: the layer that loses its heads
        self.lost = torch.empty(0, 0)  # [sample planted]: dropped planted heads

    @lru_cache(maxsize=256)  # noqa: B019  one object per run
    def mask(self, layer: int, n: int, window: int, device: torch.device) -> Bool[Tensor, "1 head query key"]:
        """Visible keys of each head; the planted heads of the layer see the whole past."""
        distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None]
        mask = repeat((distance >= 0) & (distance < window), "query key -> 1 head query key", head=self.n_heads).clone()
        for planted_layer, head in self.planted:
            if planted_layer == layer:
                mask[:, head] = distance >= 0
        return mask

    def text(
        self,
        module: nn.Module,
        query: Float[Tensor, "batch head query d_head"],
        key: Float[Tensor, "batch kv_head key d_head"],
        value: Float[Tensor, "batch kv_head key d_head"],
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch query head d_head"], None]:
        """Text attention with the masks and the head dropout of the step."""
        groups = query.shape[1] // key.shape[1]
        key, value = (repeat(x, "batch kv key d -> batch (kv group) key d", group=groups) for x in (key, value))
        layer, n = int(module.layer_idx), query.shape[2]
        mask = None if self.window is None else self.mask(layer, n, self.window, query.device)
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
        if module.training and self.dropout:
            z = z * self.kept(layer, z.shape[0], z.device) / (1 - self.dropout)
        return z.transpose(1, 2), None

    def draw(self, samples: int, n_layers: int, device: torch.device) -> None:
        """Draw for each sample of the step the layer that loses its heads (-1: none) and the dropped planted heads."""
        bare = torch.randint(n_layers, (samples,), device=device)
        self.bare_layer = bare.where(torch.rand(samples, device=device) < self.layer_dropout, -1)
        noise = torch.rand(samples, max(1, len(self.planted)), device=device)
        lost = (noise < 0.5) & (noise > noise.amin(-1, keepdim=True))  # the minimum is never dropped
        self.lost = lost & (torch.rand(samples, 1, device=device) < self.planted_dropout)

    def kept(self, layer: int, samples: int, device: torch.device) -> Float[Tensor, "sample head 1 1"]:
        """0 for the dropped heads of the layer; the values of planted heads cancel the scaling by 1 - dropout."""
        keep = (torch.rand(samples, self.n_heads, device=device) >= self.dropout).float()
        keep = keep * (self.bare_layer != layer)[:, None]
        for i, (planted_layer, head) in enumerate(self.planted):
            if planted_layer == layer:
                keep[:, head] = (1 - self.dropout) * (~self.lost[:, i]).float()
        return rearrange(keep, "sample head -> sample head 1 1")

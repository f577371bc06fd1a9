"""How far each head of a toy may look while it is trained, and which heads drop out."""

from functools import lru_cache

import torch
import torch.nn.functional as F


class Reach:
    """What the text attention may do in the current step: a local mask for all but the planted heads, head dropout.

    `dropout` drops each head but the planted ones, `layer_dropout` of the samples lose all of them in one layer, and
    `planted_dropout` of the samples lose planted heads, each with probability 1/2, but never all.
    """

    def __init__(self, n_heads: int, planted: tuple[tuple[int, int], ...]) -> None:
        self.n_heads, self.planted = n_heads, planted
        self.window: int | None = None
        self.dropout = self.layer_dropout = self.planted_dropout = 0.0
        self.bare_layer = torch.empty(0)
        self.lost = torch.empty(0, 0)

    @lru_cache(maxsize=256)  # noqa: B019  one object a run
    def mask(self, layer: int, n: int, window: int, device: torch.device) -> torch.Tensor:
        """Visible keys of each head, `[1 head query key]`; the planted heads of the layer see the whole past."""
        past = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None]
        local = ((past >= 0) & (past < window)).expand(1, self.n_heads, n, n).clone()
        for planted_layer, head in self.planted:
            if planted_layer == layer:
                local[:, head] = past >= 0
        return local

    def text(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        """Text attention with the masks and the head dropout of the step."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        layer, n = module.layer_idx, query.shape[2]
        mask = None if self.window is None else self.mask(layer, n, self.window, query.device)
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
        if module.training and self.dropout:
            z = z * self.kept(layer, z.shape[0], z.device) / (1 - self.dropout)
        return z.transpose(1, 2), None

    def draw(self, samples: int, n_layers: int, device: torch.device) -> None:
        """Choose for each sample of the step the layer that loses its heads (-1: none) and the lost planted heads."""
        bare = torch.randint(n_layers, (samples,), device=device)
        self.bare_layer = bare.where(torch.rand(samples, device=device) < self.layer_dropout, -1)
        noise = torch.rand(samples, max(1, len(self.planted)), device=device)
        lost = (noise < 0.5) & (noise > noise.amin(-1, keepdim=True))
        self.lost = lost & (torch.rand(samples, 1, device=device) < self.planted_dropout)

    def kept(self, layer: int, samples: int, device: torch.device) -> torch.Tensor:
        """The heads of the layer each sample keeps, `[sample head 1 1]`, the planted ones scaled like the rest."""
        keep = (torch.rand(samples, self.n_heads, device=device) >= self.dropout).float()
        keep = keep * (self.bare_layer != layer)[:, None]
        for i, (planted_layer, head) in enumerate(self.planted):
            if planted_layer == layer:
                keep[:, head] = (1 - self.dropout) * (~self.lost[:, i]).float()
        return keep[:, :, None, None]

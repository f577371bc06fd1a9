"""Samples in which the answer repeats words of the question, and metrics measured on them."""

import numpy as np
import torch

from helpers.attention_reference import Layers, random_layers
from hooked_mllm.measuring.view_context import ViewContext

LENGTHS = (23, 20, 17)


def talking() -> tuple[Layers, torch.Tensor]:
    """Layers whose samples end in an answer of 5 to 7 tokens, and token ids from a vocabulary of three."""
    layers = random_layers(lengths=LENGTHS, heads=6, kv_heads=2, sharpness=1.0)
    generator = torch.Generator().manual_seed(1)
    for b in range(len(LENGTHS)):
        answer = torch.zeros(23, dtype=torch.bool)
        answer[-5 - b :] = True
        layers.masks["answer"][b] = answer
        layers.masks["question"][b] = False
        layers.masks["question"][b, 9 + 2 * b : 16 - b] = True
    layers.masks["generating"] = layers.masks["answer"].roll(-1, 1) & ~layers.masks["padding"]
    layers.masks["generating"][:, -1] = False
    return layers, torch.randint(0, 3, (3, 23), generator=generator)


def measured(metric, layers: Layers, tokens: torch.Tensor, group: int = 3) -> np.ndarray:
    for start in range(0, layers.n_layers, group):
        metric.update(view=layers.view(range(start, start + group), context=ViewContext(tokens)))
    return metric.compute().values.numpy()


def per_sample(layers: Layers, formula) -> np.ndarray:
    """The mean over samples of formula(attention [query key], sample) for every head."""
    out = np.zeros(layers.attention.shape[:3])
    for l, b, h in np.ndindex(*out.shape):
        out[l, b, h] = formula(layers.attention[l, b, h], b)
    return out.mean(1)


def positions(layers: Layers, name: str, b: int) -> list[int]:
    return np.flatnonzero(layers.masks[name][b]).tolist()

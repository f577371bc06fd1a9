"""Samples of several questions about the same pictures, and their patterns."""

import numpy as np
import torch

from helpers.cache_witness import attentions, hooked
from helpers.tiny import tiny_image

QUESTIONS = ("What colour is the mug?", "Where is the dog in the picture of the star?", "Is the star red?", "so")
PICTURES = [tiny_image(32, 24, seed=n) for n in range(3)]


def prepared(family, **more):
    texts = QUESTIONS[:3]
    return [hooked(family).prepare(t, images=p, id=t, **more) for t, p in zip(texts, PICTURES, strict=True)]


def visual_rows(family, picture, question) -> np.ndarray:
    """[layer head visual]: the mean eager row of the question's tokens, of a prompt of its own."""
    one = hooked(family).prepare(question, images=picture)
    pattern = torch.stack(attentions(family, one.inputs))[:, 0].double().numpy()
    return pattern[:, :, one.mask("question")[0].numpy()].mean(2)[..., one.mask("visual")[0].numpy()]


def best(gain: np.ndarray, share: float) -> np.ndarray:
    count = int(np.ceil(share * gain.shape[-1] - 1e-9))
    return np.sort(np.maximum(gain, 0), axis=-1)[..., -count:].sum(-1)


def wordings(question):
    return [question, f"so {question}", "the dog is red" if "dog" in question else f"{question} so so"]

"""Objectives by plain transformers on the same tensors and NumPy in float64."""

import numpy as np
import torch

from helpers.wrapped import plain
from hooked_mllm.toys import VisualRetrieval

#: the questions of the toy in these tests
TASK = VisualRetrieval(seed=5, pages=1, filler=2)


def log_softmax(logits):
    """NumPy, float64."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@torch.no_grad()
def sample_logits(family, sample, dtype=torch.float32):
    """All logits of one unpadded sample `[pos vocab]`, by an unwrapped model, as float64."""
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sample.inputs.items()}
    return plain(family, dtype=dtype)(**inputs, use_cache=False).logits[0].double().numpy()


def answer_ids(sample):
    """The answer's tokens, which end the input."""
    n = sum(sample.layout.answer.tolist())
    return sample.inputs["input_ids"][0, -n:].tolist()


def answer_log_probs(family, sample, dtype=torch.float32):
    """log p of each token of the answer after those before it."""
    ids = answer_ids(sample)
    log_p = log_softmax(sample_logits(family, sample, dtype))[-len(ids) - 1 : -1]
    return log_p[np.arange(len(ids)), ids]


def close(got, expected, tolerance=2e-4):
    np.testing.assert_allclose(got.detach().cpu().double().numpy(), expected, rtol=0, atol=tolerance)

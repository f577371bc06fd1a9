"""The formulas of the metrics as loops in NumPy, and metrics fed sample by sample."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from helpers.attention_reference import Layers
from hooked_mllm.metrics import AttentionScore, HeadMetric, KeyTokenRatio, RetrievalAttentionMass, VisionMass

LENGTHS = (23, 17, 20, 23)


class SinkMass(HeadMetric):
    """A user's metric: what the question pays to the first token of the sequence."""

    def score(self, view):
        return view.profile("question")[..., 0]


def mass(layers: Layers, queries: str, keys: str) -> np.ndarray:
    """[layer batch head], eq. 1 as it is written: mean over i in Q of the sum over j in K of A[i, j]."""
    out = np.zeros(layers.attention.shape[:3])
    for l, b, h in np.ndindex(*out.shape):
        rows = np.flatnonzero(layers.masks[queries][b])
        columns = np.flatnonzero(layers.masks[keys][b])
        out[l, b, h] = sum(layers.attention[l, b, h, i, j] for i in rows for j in columns) / len(rows)
    return out


def key_sets(layers: Layers, share: float, queries: str = "question") -> list[np.ndarray]:
    """Per sample [layer head key]: S of eq. 22, over the sample's own N positions, ties to the lower index."""
    out = []
    for b, padding in enumerate(layers.masks["padding"].numpy()):
        real = np.flatnonzero(~padding)
        profile = layers.profile(queries)[:, b]
        chosen = np.zeros(profile.shape, dtype=bool)
        for l, h in np.ndindex(*profile.shape[:2]):
            order = real[np.argsort(-profile[l, h, real].round(12), kind="stable")]
            chosen[l, h, order[: math.ceil(round(share * len(real), 9))]] = True
        out.append(chosen)
    return out


def key_token_ratio(layers: Layers, share: float) -> np.ndarray:
    """[layer batch head], eq. 23."""
    targets = layers.masks["target"].numpy()
    return np.stack([s[..., t].mean(-1) for s, t in zip(key_sets(layers, share), targets, strict=True)], axis=1)


def argmax_inside(layers: Layers) -> np.ndarray:
    """[layer batch head]: the share of the last query's rows whose largest key is a target."""
    out = np.zeros(layers.attention.shape[:3])
    for l, b, h in np.ndindex(*out.shape):
        rows = layers.attention[l, b, h][layers.masks["question"][b].numpy()]
        out[l, b, h] = np.mean([bool(layers.masks["target"][b, row.argmax()]) for row in rows])
    return out


def elected(layers: Layers, n: int) -> np.ndarray:
    """[layer batch head]: 1 for the n heads with the highest mass of each sample."""
    scores = mass(layers, "question", "target")
    out = np.zeros(scores.shape)
    for b in range(scores.shape[1]):
        flat = scores[:, b].ravel()
        best = np.argsort(-flat, kind="stable")[:n]
        votes = np.zeros_like(flat)
        votes[best] = 1
        out[:, b] = votes.reshape(out[:, b].shape)
    return out


METRICS: dict[str, tuple[Callable[[], HeadMetric], Callable[[Layers], np.ndarray]]] = {
    "ram": (RetrievalAttentionMass, lambda x: mass(x, "question", "target")),
    "ram-last": (lambda: RetrievalAttentionMass(queries="last"), lambda x: mass(x, "last", "target")),
    "vision": (VisionMass, lambda x: mass(x, "question", "visual")),
    "ktr": (KeyTokenRatio, lambda x: key_token_ratio(x, 0.05)),
    "ktr-share": (lambda: KeyTokenRatio(share=0.2), lambda x: key_token_ratio(x, 0.2)),
    "topk": (lambda: AttentionScore(reduce="topk", share=0.3), lambda x: key_token_ratio(x, 0.3)),
    "answer-sum": (lambda: AttentionScore(queries="answer"), lambda x: mass(x, "answer", "target")),
    "argmax": (lambda: AttentionScore(reduce="argmax"), argmax_inside),
    "frequency": (lambda: AttentionScore(over_samples="frequency", select=3), lambda x: elected(x, 3)),
    "frequency-share": (lambda: AttentionScore(over_samples="frequency", select=0.2), lambda x: elected(x, 3)),
    "user": (SinkMass, lambda x: np.stack([x.profile("question")[:, b, :, s] for b, s in enumerate(starts(x))], 1)),
}


def starts(layers: Layers) -> list[int]:
    return [0] * len(layers.masks["padding"])  # SinkMass reads position 0 of the batch


each_metric = pytest.mark.parametrize(("make", "reference"), METRICS.values(), ids=METRICS.keys())


def per_sample(metric: HeadMetric, layers: Layers, group: int | None = None) -> HeadMetric:
    """Feed one sample at a time, in views of `group` layers."""
    group = group or layers.n_layers
    for b in range(len(layers.masks["padding"])):
        for start in range(0, layers.n_layers, group):
            metric.update(view=layers.view(range(start, min(start + group, layers.n_layers)), slice(b, b + 1)))
    return metric

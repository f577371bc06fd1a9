"""Scores kept sample by sample: the same numbers whose mean is computed, in every way of measuring."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from hooked_mllm.errors import InputError
from hooked_mllm.metrics import AttentionScore, KeyTokenRatio, RetrievalAttentionMass, VisionMass

LENGTHS = (23, 17, 20)


def test_they_are_the_samples_own_scores():
    layers = random_layers(lengths=LENGTHS)
    metric = RetrievalAttentionMass().keep_samples()
    for start in range(3):
        metric.update(view=layers.view(range(start, start + 1)))
    kept = metric.sample_scores()
    assert len(kept) == 3 and kept.shape == (3, 4) and kept.provenance["metric"] == "RetrievalAttentionMass"
    for b in range(3):
        one = RetrievalAttentionMass()
        one.update(view=layers.view(samples=slice(b, b + 1)))
        np.testing.assert_allclose(kept.values[b], one.compute().values, atol=1e-7)
    np.testing.assert_allclose(kept.mean().values, metric.compute().values, atol=1e-15)
    assert torch.equal(kept.mean().counts, metric.compute().counts)


def test_votes_are_kept_where_samples_vote():
    layers = random_layers(lengths=LENGTHS)
    metric = AttentionScore(over_samples="frequency", select=3).keep_samples()
    metric.update(view=layers.view())
    kept = metric.sample_scores().values
    assert kept.sum((1, 2)).eq(3).all() and torch.equal(kept.mean(0), metric.compute().values)


def test_merged_resumed_cast_and_reset():
    layers = random_layers(lengths=LENGTHS)
    whole = KeyTokenRatio(share=0.2).keep_samples()
    whole.update(view=layers.view())
    parts = []
    for part in (slice(0, 2), slice(2, 3)):
        metric = KeyTokenRatio(share=0.2).keep_samples()
        metric.half().update(view=layers.view(samples=part))
        parts.append(metric)
    resumed = KeyTokenRatio(share=0.2).keep_samples()
    resumed.load_state_dict(parts[1].state_dict())
    resumed.merge_state(parts[0])  # what comes in stands first
    assert torch.equal(resumed.sample_scores().values, whole.sample_scores().values)
    assert resumed.each.dtype == torch.float64
    whole.reset()
    whole.update(view=layers.view(samples=slice(0, 1)))
    assert len(whole.sample_scores()) == 1


def test_layers_not_measured_are_missing():
    metric = VisionMass().keep_samples()
    metric.update(view=random_layers(n_layers=4).view(range(2, 4)))
    assert metric.sample_scores().missing == metric.compute().missing == (0, 1)


def test_bad_input_is_rejected():
    metric = VisionMass()
    metric.update(view=random_layers().view())
    with pytest.raises(InputError, match="before the first"):
        metric.keep_samples()
    with pytest.raises(InputError, match=r"VisionMass\(\).keep_samples\(\)"):
        metric.sample_scores()
    with pytest.raises(InputError, match="seen no sample"):
        VisionMass().keep_samples().sample_scores()

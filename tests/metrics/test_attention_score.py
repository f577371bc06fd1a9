"""The formula of attention scores in NumPy, and the score of chance."""

import numpy as np
import pytest

from helpers.attention_reference import random_layers
from helpers.metric_witness import LENGTHS, SinkMass, each_metric, per_sample
from hooked_mllm.heads import HeadScores
from hooked_mllm.metrics import KeyTokenRatio, RetrievalAttentionMass, VisionMass


@each_metric
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_over_samples_is_the_formula(make, reference, side):
    layers = random_layers(lengths=LENGTHS, padding_side=side, window=9)
    metric = make()
    metric.update(view=layers.view())
    scores = metric.compute()
    assert isinstance(scores, HeadScores) and scores.shape == (3, 4)
    np.testing.assert_allclose(scores.values.numpy(), reference(layers).mean(1), atol=3e-6)
    assert scores.counts.eq(4).all()
    if make is not SinkMass:  # whose first position is padding here
        assert 0 < scores.values.max() <= 1


@pytest.mark.parametrize("metric", [RetrievalAttentionMass, VisionMass], ids=lambda m: m.__name__)
def test_the_chance_level_is_stored_with_a_mass(metric):
    layers = random_layers(lengths=LENGTHS, window=9)
    flat = random_layers(lengths=LENGTHS, window=9, sharpness=0.0)  # q = 0: a head that attends evenly
    scores, even = per_sample(metric(), layers, 2).compute(), per_sample(metric(), flat, 2).compute()
    chance = scores.provenance["chance"]
    np.testing.assert_allclose(even.values, np.repeat(np.array(chance)[:, None], 4, axis=1), atol=1e-6)
    assert "chance" not in per_sample(KeyTokenRatio(), layers).compute().provenance

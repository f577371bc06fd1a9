"""Retrieval attention mass against the double sum of eq. 1."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from helpers.metric_witness import LENGTHS, mass
from hooked_mllm.errors import LayoutError
from hooked_mllm.metrics import AttentionScore, RetrievalAttentionMass


@pytest.mark.parametrize("queries", ["question", "answer"])
def test_it_is_the_double_sum(queries):
    layers = random_layers(lengths=LENGTHS, seed=3)
    metric = RetrievalAttentionMass(queries=queries)
    metric.update(view=layers.view())
    np.testing.assert_allclose(metric.compute().values, mass(layers, queries, "target").mean(1), atol=3e-6)


def test_it_is_a_setting_of_attention_score():
    layers = random_layers(lengths=LENGTHS)
    metrics = RetrievalAttentionMass(), AttentionScore(queries="question", keys="target", reduce="sum")
    for metric in metrics:
        metric.update(view=layers.view())
    assert torch.equal(metrics[0].compute().values, metrics[1].compute().values)
    assert metrics[0].config() == {"queries": "question"}


def test_a_sample_without_target():
    layers = random_layers()
    layers.masks["target"][:] = False
    with pytest.raises(LayoutError, match="target"):
        RetrievalAttentionMass().update(view=layers.view())

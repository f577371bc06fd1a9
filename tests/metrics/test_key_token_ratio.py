"""Key token ratios against eq. 22 and 23, and hits."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from helpers.metric_witness import LENGTHS, key_token_ratio, per_sample
from hooked_mllm.metrics import KeyTokenRatio


def test_hit_rate_is_the_share_of_samples_that_reach_the_ratio():
    layers = random_layers(lengths=LENGTHS, sharpness=3.0)
    reached = []
    for hit in (0.3, 0.5, 1.0):
        metric = per_sample(KeyTokenRatio(share=0.2, hit=hit), layers)
        expected = (key_token_ratio(layers, 0.2) >= hit).mean(1)
        rate = metric.hit_rate()
        assert np.array_equal(rate.values.numpy(), expected)
        assert rate.name == "KeyTokenRatio.hit_rate"
        reached.append(expected.sum())
    assert reached[0] > reached[1] > 0


@pytest.mark.parametrize("hit", [1 / 3, 1 - 2 / 3, np.float32(1 / 3), np.float32(2 / 3) / 2])
def test_a_ratio_hits_the_threshold_that_it_was_rounded_to(hit):
    exact = torch.tensor([[[1 / 3, 0.3333, 2 / 3]]], dtype=torch.float64)  # [layer batch head]
    metric = KeyTokenRatio(hit=hit)
    metric.score = lambda view: exact
    layers = random_layers(lengths=LENGTHS[:1], n_layers=1, heads=3, kv_heads=3)
    metric.update(view=layers.view())
    assert metric.hit_rate().values.tolist() == [[1.0, 0.0, 1.0]]


def test_an_early_target_token_of_eq_23():
    # 20 positions, ceil(0.05 * 20) = 1: the one key with the largest mean attention
    n = 20
    q, k = torch.zeros(1, 1, n, 2), torch.zeros(1, 1, n, 2)
    q[..., 0], k[0, 0, 4, 0] = 1.0, 5.0
    layers = random_layers(lengths=(n,), n_layers=1, heads=1, kv_heads=1)
    layers.q, layers.k = [q], [k]
    metric = KeyTokenRatio()
    metric.update(view=layers.view())
    assert metric.compute()[0, 0] == 1 / 3  # target 4, 5, 6

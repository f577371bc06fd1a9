"""The plain functions against the metric objects, and their refusals."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from hooked_mllm.errors import InputError
from hooked_mllm.metrics import KeyTokenCoverage, KeyTokenRatio, RetrievalAttentionMass, functional


@pytest.fixture
def layers():
    return random_layers(n_layers=4, lengths=(41,))


@pytest.fixture
def pattern(layers):
    """[layer head query key] of the only sample, in float64."""
    return torch.from_numpy(layers.attention[:, 0])


def test_functions_equal_the_metrics(layers, pattern):
    question, target = layers.masks["question"][0], layers.masks["target"][0]
    metrics = [RetrievalAttentionMass(), KeyTokenRatio(share=0.1)]
    for metric in metrics:
        metric.update(view=layers.view())
    ram, ktr = (metric.compute() for metric in metrics)
    profile = functional.attention_profile(pattern, question)
    np.testing.assert_allclose(functional.attention_mass(pattern, question, target), ram.values, atol=3e-6)
    np.testing.assert_allclose(functional.key_token_ratio(profile, target, 0.1), ktr.values, atol=1e-12)
    coverage = KeyTokenCoverage(ram, share=0.1)
    coverage.update(view=layers.view())
    ranked = torch.stack([profile[layer, head] for layer, head in ram.ranking])
    curve = functional.key_token_coverage(ranked, target, 0.1)
    np.testing.assert_allclose(curve, coverage.compute().coverage, atol=1e-12)
    np.testing.assert_allclose(profile.numpy(), layers.profile("question")[:, 0], atol=1e-12)


@pytest.mark.parametrize("n", [1, 7, 20, 140])
def test_key_tokens_are_the_largest_with_ties_to_the_left(n):
    values = np.random.default_rng(n).integers(0, 4, (3, n)) / 4
    chosen = functional.key_tokens(torch.from_numpy(values), 0.05)
    k = int(np.ceil(round(0.05 * n, 9)))
    for row, mask in zip(values, chosen.numpy(), strict=True):
        assert np.flatnonzero(mask).tolist() == sorted(np.argsort(-row, kind="stable")[:k])


def test_shapes_are_checked_at_every_call(pattern):
    with pytest.raises(Exception, match="query"):
        functional.attention_profile(pattern, torch.ones(40, dtype=torch.bool))
    with pytest.raises(Exception, match="keys"):
        functional.attention_mass(pattern, torch.ones(41, dtype=torch.bool), torch.ones(40, dtype=torch.bool))


def test_empty_sets_are_refused(pattern):
    nothing = torch.zeros(41, dtype=torch.bool)
    profile = pattern.mean(-2)
    with pytest.raises(InputError, match="No query token"):
        functional.attention_profile(pattern, nothing)
    with pytest.raises(InputError, match="target is empty"):
        functional.key_token_ratio(profile, nothing)
    with pytest.raises(InputError, match="target is empty"):
        functional.key_token_coverage(profile[0], nothing)
    for share in (0.0, 1.01):
        with pytest.raises(InputError, match="share above 0"):
            functional.key_tokens(profile, share)

"""The plain functions against the metric objects."""

import numpy as np
import torch

from hooked_mllm.metrics import KeyTokenCoverage, KeyTokenRatio, RetrievalAttentionMass, functional


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

"""Gradients at the visual features against a run by hand."""

import numpy as np
import pytest

from helpers.cache_witness import hooked
from helpers.evidence_witness import forced, prepared, reset, with_features
from hooked_mllm.metrics import GradientAgreement


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_gradients(family, n_tokens):
    sample = prepared(family, 1)
    reset(family)
    inputs, answer = forced(family, sample, n_tokens)
    reset(family)
    leaves = []

    def watch(features):
        leaves.extend(f.requires_grad_(True) for f in features)
        return leaves

    logits, visual = with_features(family, inputs, watch)
    p = logits[-len(answer) :].double().softmax(-1).gather(1, answer[:, None])[:, 0]
    (p / (1 - p)).log().sum().backward()
    assert len(leaves) == (3 if family == "qwen3_vl" else 1)
    rules = {
        "norm": sum(leaf.grad.double().square().sum(-1) for leaf in leaves),
        "gradient_x_input": sum((leaf.grad * leaf.detach()).double().sum(-1) for leaf in leaves).abs(),
    }
    for rule, due in rules.items():
        agreement = GradientAgreement(rule=rule, n_tokens=n_tokens)
        weights = agreement.weights(hooked(family), sample)
        np.testing.assert_allclose(weights[visual[: len(sample)]], due / due.sum(), rtol=2e-3, atol=1e-5)
        assert not weights[~visual[: len(sample)]].any() and weights.sum() == pytest.approx(1)
        assert due.max() > 2 * due.mean()

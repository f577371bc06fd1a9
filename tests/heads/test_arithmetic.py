"""Arithmetic of head scores against torch, and the expression that it records."""

import numpy as np
import pytest
import torch

from hooked_mllm.errors import NumericsError
from hooked_mllm.heads import HeadScores


def scores(seed=0, n_layers=6, n_heads=8, **options):
    values = np.random.default_rng(seed).random((n_layers, n_heads))
    return HeadScores(values, **{"name": "RAM", **options})


def test_arithmetic_is_head_by_head_and_is_recorded():
    a, b = scores(0), scores(1, name="VisionMass")
    for got, expected in (
        (a + b, a.values + b.values),
        (a - b, a.values - b.values),
        (a * 2, a.values * 2),
        (1 - a, 1 - a.values),
        (a / b, a.values / b.values),
        (0.1 / b, 0.1 / b.values),
        (-a, -a.values),
    ):
        assert torch.equal(got.values, expected)
    ratio = (a - 0.5 * b) / 2
    assert ratio.name == ratio.provenance["expression"] == "((RAM - (0.5 * VisionMass)) / 2)"
    (inner,) = ratio.provenance["operands"]
    assert [operand["name"] for operand in inner["provenance"]["operands"]] == ["RAM", "(0.5 * VisionMass)"]
    with pytest.raises(TypeError):
        a + "RAM"
    with pytest.raises(NumericsError, match="not finite"):
        a / (b - b)


def test_counts_stay_only_where_all_operands_agree():
    a, b = scores(0, counts=[5] * 6), scores(1, counts=[5] * 6)
    assert torch.equal((a - b).counts, a.counts)
    assert (a * 2).counts is not None
    assert (a - scores(1, counts=[4] * 6)).counts is None

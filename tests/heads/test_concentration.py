"""The share of the heads that hold half of the score, counted one by one."""

import numpy as np
import pytest

from hooked_mllm.errors import NumericsError
from hooked_mllm.heads import HeadScores, rho_half


def literal_rho(values: np.ndarray) -> float:
    positive = sorted((max(v, 0.0) for v in values.ravel()), reverse=True)
    for k in range(1, len(positive) + 1):
        if sum(positive[:k]) >= 0.5 * sum(positive):
            return k / len(positive)
    raise AssertionError


@pytest.mark.parametrize("seed", range(4))
def test_rho_half(seed):
    values = np.random.default_rng(seed).normal(size=(4, 6)) ** 3
    scores = HeadScores(values)
    assert scores.rho_half() == rho_half(scores) == literal_rho(values)


def test_rho_half_of_plain_cases():
    assert HeadScores(np.ones((4, 5))).rho_half() == 0.5
    assert HeadScores(np.full((2, 5), 0.1)).rho_half() == 0.5  # 5 * 0.1 is the half in spite of rounding
    assert HeadScores([[9.0, 1.0, -20.0, 0.0]]).rho_half() == 0.25
    assert HeadScores([[9.0, 1.0], [np.nan, np.nan]], missing=[1]).rho_half() == 0.5
    with pytest.raises(NumericsError, match="no score is positive"):
        HeadScores([[-1.0, 0.0]]).rho_half()

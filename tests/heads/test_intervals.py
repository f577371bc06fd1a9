"""Intervals of means: their coverage by simulation, the studentised bootstrap by loops, SciPy for shares."""

import numpy as np
import pytest
from scipy import stats

from hooked_mllm.errors import InputError
from hooked_mllm.heads.intervals import mean_interval

#: skewed scores of samples as of attention on a region, with their true means
SKEWED = {
    "beta(0.5, 10)": (stats.beta(0.5, 10), 0.5 / 10.5),
    "beta(1, 10)": (stats.beta(1, 10), 1 / 11),
    "gamma(0.4)": (stats.gamma(0.4), 0.4),
    "lognormal(0.8)": (stats.lognorm(0.8), np.exp(0.32)),
}


def coverage(values, truth, **options):
    low, high = mean_interval(values, **options)
    return float(((low <= truth) & (truth <= high)).mean())


@pytest.mark.parametrize("n_samples", [5, 8, 16])
@pytest.mark.parametrize("scores", SKEWED)
def test_intervals_of_few_skewed_scores_cover_the_true_mean(scores, n_samples):
    distribution, truth = SKEWED[scores]
    values = distribution.rvs((n_samples, 4000), random_state=np.random.default_rng(0))
    assert coverage(values, truth) >= 0.93
    if n_samples == 8:  # the percentile interval, which this one replaces, does not
        draws = np.random.default_rng(1).integers(0, 8, (1000, 8))
        ends = np.quantile(values[:, :500][draws].mean(1), [0.025, 0.975], axis=0)
        assert ((ends[0] <= truth) & (truth <= ends[1])).mean() < 0.88


def test_intervals_of_even_scores_are_not_far_too_wide():
    values = np.random.default_rng(0).normal(size=(60, 4000))
    assert 0.94 < coverage(values, 0.0) < 0.98 and 0.88 < coverage(values, 0.0, level=0.9) < 0.94


def test_the_studentised_bootstrap_by_loops():
    values, n = np.random.default_rng(3).gamma(0.5, size=(12, 5)), 400
    counts = np.random.default_rng(7).multinomial(12, np.full(12, 1 / 12), size=n)
    low, high = mean_interval(values, level=0.9, n=n, seed=7)
    for item, x in enumerate(values.T):
        error = x.std(ddof=1) / np.sqrt(12)
        t = []
        for count in counts:
            draw = np.repeat(x, count)
            t.append((draw.mean() - x.mean()) / max(draw.std() / np.sqrt(11), error / 10))
        tail = 0.1 * 12 / 24 / 2
        ends = x.mean() - np.quantile(t, [1 - tail, tail]) * error
        np.testing.assert_allclose([low[item], high[item]], ends, rtol=1e-9)


@pytest.mark.parametrize("hits", [0, 1, 5, 11, 12])
def test_shares_have_the_exact_interval_of_scipy(hits):
    values = np.array([[1.0]] * hits + [[0.0]] * (12 - hits))
    expected = stats.binomtest(hits, 12).proportion_ci(0.9, method="exact")
    low, high = mean_interval(values, level=0.9)
    np.testing.assert_allclose([low[0], high[0]], [expected.low, expected.high], atol=1e-12)


def test_ties_and_missing_items():
    values = np.array([[0.25, np.nan, 0.3]] * 7 + [[0.25, np.nan, 0.0]])
    low, high = mean_interval(values)
    assert low[0] == high[0] == 0.25 and np.isnan([low[1], high[1]]).all()
    assert np.isfinite([low[2], high[2]]).all() and low[2] < values[:, 2].mean() < high[2]


def test_items_in_pieces_are_those_at_once(monkeypatch):
    values = np.random.default_rng(0).random((9, 24))
    expected = mean_interval(values, n=50)
    monkeypatch.setattr("hooked_mllm.heads.intervals.CHUNK", 150)
    np.testing.assert_allclose(mean_interval(values, n=50), expected, rtol=1e-12)


def test_intervals_that_cannot_be():
    values = np.ones((8, 2))
    with pytest.raises(InputError, match="needs 5 samples at least.* got 4. Measure more"):
        mean_interval(values[:4])
    for options in ({"level": 1.0}, {"level": 0.0}, {"level": float("nan")}, {"n": 0}):
        with pytest.raises(InputError, match="level between 0 and 1"):
            mean_interval(values, **options)
    with pytest.raises(InputError, match="A seed is an integer"):
        mean_interval(values, seed=None)

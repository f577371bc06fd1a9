"""Scores of every sample: means, draws without replacement, and values that are none, against NumPy."""

import random

import numpy as np
import pytest
import torch

from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads import HeadScores, SampleScores

VALUES = np.random.default_rng(0).normal(size=(7, 3, 4))


@pytest.fixture
def scores():
    return SampleScores(VALUES, name="RAM", provenance={"model": "toy"})


def test_the_mean_is_that_of_numpy(scores):
    mean = scores.mean()
    assert isinstance(mean, HeadScores) and mean.name == "RAM"
    np.testing.assert_allclose(mean.values, VALUES.mean(0), atol=1e-15)
    assert mean.counts.eq(7).all() and mean.provenance == {"model": "toy", "n_samples": 7}
    assert (len(scores), scores.shape) == (7, (3, 4))


def test_the_mean_over_some_samples_counts_repeats(scores):
    mean = scores.mean([6, 0, 6])
    np.testing.assert_allclose(mean.values, (2 * VALUES[6] + VALUES[0]) / 3, atol=1e-15)
    assert mean.counts.eq(3).all()


@pytest.mark.parametrize(("n", "count"), [(1, 1), (4, 4), (7, 7), (0.5, 4), (1.0, 7)])
def test_draws_are_without_replacement_and_by_seed(scores, n, count):
    drawn = scores.draw(n, seed=5)
    samples = sorted(random.Random(5).sample(range(7), count))
    np.testing.assert_allclose(drawn.values, VALUES[samples].mean(0), atol=1e-15)
    assert drawn.provenance["seed"] == 5 and drawn.provenance["samples_drawn"] == samples
    assert torch.equal(scores.draw(n, seed=5).values, drawn.values)


def test_the_ids_are_those_of_the_samples_in_the_mean():
    scores = SampleScores(VALUES, provenance={"sample_ids": [f"s{number}" for number in range(7)]})
    assert scores.mean([6, 0, 6]).provenance == {"sample_ids": ["s6", "s0", "s6"], "n_samples": 3}
    drawn = scores.draw(3, seed=1).provenance
    assert drawn["sample_ids"] == [f"s{number}" for number in drawn["samples_drawn"]]
    for numbers in ([], [7], [-1]):
        with pytest.raises(HeadError, match="numbers of samples from 0 to 6"):
            scores.mean(numbers)


@pytest.mark.parametrize("n", [0, 8, -1, 0.0, 1.5])
def test_draws_that_cannot_be(scores, n):
    with pytest.raises(HeadError):
        scores.draw(n, seed=0)


def test_layers_that_no_sample_has_are_missing():
    values = VALUES.copy()
    values[:, 1] = np.nan
    scores = SampleScores(values)
    assert scores.missing == (1,) and scores.mean().missing == (1,)
    assert scores.mean().counts.tolist() == [[7] * 4, [0] * 4, [7] * 4]
    np.testing.assert_allclose(scores.mean([0]).values[0], VALUES[0, 0])


def test_values_that_are_not_finite_are_named_by_sample_and_head():
    values = VALUES.copy()
    values[4, 2, 3] = np.nan
    values[5, 0, 0] = np.inf
    with pytest.raises(NumericsError, match="RAM: 2 scores are not finite, first that of L2H3 in sample 4"):
        SampleScores(values, name="RAM")


@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 4), (2, 3, 0), (1, 1, 1, 1)])
def test_values_of_another_shape(shape):
    with pytest.raises(HeadError, match=r"\[sample layer head\]; got shape"):
        SampleScores(np.zeros(shape))


def test_text(scores):
    assert repr(scores) == "SampleScores(RAM, 7 samples of 3 x 4 layers x heads)"


def test_the_table_of_a_notebook_shows_the_mean_and_escapes_the_name():
    html = SampleScores([[[0.25, -0.5]], [[0.75, -0.5]]], name="<b>")._repr_html_()
    assert "&lt;b&gt;, 2 samples of 1 layers x 2 heads" in html and "<b>" not in html
    assert ">0.50</td>" in html and ">-0.50</td>" in html

"""Values, counts and missing layers, and what is none."""

import numpy as np
import pytest
import torch

from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.head_values import HeadValues


def scores(seed=0, n_layers=6, n_heads=8, **options):
    values = np.random.default_rng(seed).random((n_layers, n_heads))
    return HeadScores(values, **{"name": "RAM", **options})


def test_bad_values_are_rejected():
    values = np.ones((3, 4))
    values[1, 2] = np.nan
    with pytest.raises(NumericsError, match=r"1 scores are not finite, first at L1H2"):
        HeadScores(values)
    values[1, 2] = np.inf
    with pytest.raises(NumericsError, match="L1H2"):
        HeadScores(values, missing=[0])
    with pytest.raises(HeadError, match=r"\[layer head\]; got shape \[4\]"):
        HeadScores([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(HeadError, match="Missing layer 3 is out of range"):
        HeadScores(np.ones((3, 4)), missing=[3])
    with pytest.raises(HeadError, match="Every layer"):
        HeadScores(np.ones((1, 4)), missing=[0])
    with pytest.raises(HeadError, match="Expected counts"):
        HeadScores(np.ones((3, 4)), counts=[1, 2])


def test_equality_is_a_plain_boolean():
    assert (scores(0) == scores(0)) is True
    assert (scores(0) == scores(1)) is False
    assert scores(0) != scores(0, name="other") and scores(0) != scores(0, counts=[1] * 6)
    assert scores(0, missing=[1]) == scores(0, missing=[1]) != scores(0)
    assert scores(0, provenance={"seed": 1}) == scores(0, provenance={"seed": 2})
    assert scores(0) != 1


def test_the_values_are_a_float64_copy():
    source = torch.rand(2, 3, dtype=torch.float16)
    s = HeadScores(source)
    source.zero_()
    assert s.values.dtype == torch.float64 and s.values.any()


def test_counts_of_layers_are_those_of_their_heads():
    values = HeadValues(np.ones((3, 2)), counts=[4, 0, 2])
    assert values.counts.tolist() == [[4, 4], [0, 0], [2, 2]] and values.counts.dtype == torch.int64
    assert torch.equal(HeadValues(np.ones((3, 2)), counts=values.counts).counts, values.counts)


def test_missing_layers_have_no_values():
    values = HeadValues(np.arange(6.0).reshape(3, 2), missing=[2, 0, 2])
    assert values.missing == (0, 2) and values.measured.tolist() == [[False, False], [True, True], [False, False]]
    assert values.values[1].tolist() == [2.0, 3.0] and values.shape == (3, 2)


@pytest.mark.parametrize("values", ["abc", [[1.0, 2.0], [3.0]], [["x"]], object()])
def test_what_holds_no_numbers(values):
    with pytest.raises(HeadError, match="Expected values of shape .*, a tensor, an array or nested lists of numbers"):
        HeadValues(values)


@pytest.mark.parametrize("counts", [[1.0, np.nan, 2], [1, -1, 2], [1.5, 1, 2], [np.inf, 1, 1]])
def test_counts_that_count_nothing(counts):
    with pytest.raises(HeadError, match="whole numbers of samples, 0 or more"):
        HeadValues(np.ones((3, 2)), counts=counts)

"""Scores and plain numbers as a matrix, and the heads that a `top=` argument specifies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.errors import HeadError, InputError, NumericsError
from hooked_mllm.heads import HeadScores, HeadSet
from hooked_mllm.plots.head_matrix import head_matrix

VALUES = np.array([[0.3, 0.9, 0.1], [0.9, 0.2, 0.8]])
ORDER = [(0, 1), (1, 0), (1, 2), (0, 0), (1, 1), (0, 2)]  # ties to the lower layer


@pytest.mark.parametrize(
    "make", [np.array, np.ndarray.tolist, torch.tensor, HeadScores], ids=lambda make: make.__name__
)
def test_every_form_is_the_same_matrix(make):
    matrix = head_matrix(make(VALUES), name="plain")
    np.testing.assert_array_equal(matrix.values, VALUES)
    assert matrix.shape == (2, 3) and matrix.measured.all()
    assert matrix.name == ("scores" if make is HeadScores else "plain")
    assert matrix.top(3) == ORDER[:3]


@given(st.integers(0, 9))
def test_a_number_of_heads_is_cut_at_all_of_them(k):
    assert head_matrix(VALUES).top(k) == ORDER[:k]
    assert head_matrix(HeadScores(VALUES)).top(k) == ORDER[:k]


@given(st.integers(0, 1000))
def test_a_share_is_rounded_up(thousandths):
    n = math.ceil(thousandths * 6 / 1000)
    assert head_matrix(VALUES).top(thousandths / 1000) == ORDER[:n]


def test_heads_without_a_value_are_not_ranked():
    values = VALUES.copy()
    values[1] = np.nan
    matrix = head_matrix(values)
    assert matrix.top(5) == [(0, 1), (0, 0), (0, 2)] and matrix.top(0.5) == [(0, 1), (0, 0)]
    assert matrix.measured.tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("k", [-1, 1.5, -0.1])
def test_numbers_that_count_no_heads(k):
    for scores in (VALUES, HeadScores(VALUES)):
        with pytest.raises(HeadError):
            head_matrix(scores).top(k)


@pytest.mark.parametrize(
    ("heads", "pairs"),
    [
        (None, []),
        (2, ORDER[:2]),
        (0.5, ORDER[:3]),
        (np.float32(0.5), ORDER[:3]),
        ("L1H2, L0H0", [(1, 2), (0, 0)]),
        ([(1, 2)], [(1, 2)]),
        (HeadSet(["L1H1"], n_layers=2, n_heads=3), [(1, 1)]),
    ],
    ids=str,
)
def test_heads_in_every_form(heads, pairs):
    assert head_matrix(VALUES).selected(heads) == pairs


@pytest.mark.parametrize("heads", [True, "L2H0", HeadSet(["L1H1"], n_layers=4, n_heads=3)], ids=str)
def test_heads_that_the_matrix_lacks(heads):
    with pytest.raises(HeadError):
        head_matrix(VALUES).selected(heads)


@pytest.mark.parametrize("values", [[1.0, 2.0], np.zeros((0, 3)), np.zeros((1, 2, 3)), [["a"]]], ids=str)
def test_what_is_no_matrix(values):
    with pytest.raises(InputError):
        head_matrix(values)


def test_infinities():
    with pytest.raises(NumericsError, match="1 infinities"):
        head_matrix([[1.0, float("inf")]])

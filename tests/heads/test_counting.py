"""Shares of a number, counted as decimal numbers."""

from decimal import ROUND_CEILING, Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads.counting import check_seed, resolve_count, share_count


@pytest.mark.parametrize(
    ("share", "n", "expected"), [(0.05, 140, 7), (0.1, 30, 3), (0.05, 1152, 58), (0.05, 1, 1), (0.0, 9, 0)]
)
def test_a_share_is_the_decimal_that_was_typed(share, n, expected):
    assert share_count(share, n) == expected == resolve_count(share, n)


@given(st.integers(0, 10_000), st.integers(1, 2000))
def test_a_typed_share_is_rounded_up_in_decimal_arithmetic(ten_thousandths, n):
    share = ten_thousandths / 10_000
    exact = Decimal(ten_thousandths) / 10_000 * n
    assert share_count(share, n) == int(exact.to_integral_value(ROUND_CEILING))


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_of_its_range(share):
    with pytest.raises(ValueError, match="A share is a number from 0 to 1"):
        share_count(share, 10)
    with pytest.raises(HeadError, match=r"A float is a share of the 10 samples.*pass an int"):
        resolve_count(share, 10, "samples")


@pytest.mark.parametrize("k", [True, -1, 11])
def test_numbers_that_count_nothing(k):
    with pytest.raises(HeadError, match="number of heads"):
        resolve_count(k, 10)


@pytest.mark.parametrize("k", [0, 3, 10])
def test_a_number_stays_a_number(k):
    assert resolve_count(k, 10) == int(k) and type(resolve_count(k, 10)) is int


@pytest.mark.parametrize("n", [1, 48, 784, 1152])
def test_a_ratio_that_was_computed_counts_what_it_was_computed_from(n):
    for k in range(n + 1):
        mask = torch.zeros(n)
        mask[:k] = 1
        ratios = [k / n, 1 - (n - k) / n, np.float64(k) / n, np.float32(k) / np.float32(n), mask.mean().item()]
        assert [share_count(ratio, n) for ratio in ratios] == [k] * 5
        assert resolve_count(Fraction(k, n), n) == k


@given(st.integers(0, 1000), st.integers(1, 2000))
def test_a_typed_share_in_float32_counts_as_much(thousandths, n):
    exact = Decimal(thousandths) / 1000 * n
    share = np.float32(thousandths / 1000)
    assert resolve_count(share, n) == int(exact.to_integral_value(ROUND_CEILING)) == share_count(float(share), n)


def test_a_share_above_a_number_counts_one_more():
    assert share_count(0.3 + 1e-9, 10) == 4 and share_count(1e-12, 10) == 1 and share_count(1e-300, 10) == 1
    assert resolve_count(np.float16(0.05), 140) == 7 and resolve_count(np.int64(3), 10) == 3


@pytest.mark.parametrize("seed", [None, 1.0, "0", True, -1])
def test_seeds_whose_draw_is_not_repeatable(seed):
    with pytest.raises(InputError, match="A seed is an integer of 0 or more"):
        check_seed(seed)
    assert check_seed(np.int64(3)) == 3 and type(check_seed(np.int64(3))) is int

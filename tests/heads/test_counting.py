"""Shares of a number, counted as decimal numbers."""

from decimal import ROUND_CEILING, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.errors import HeadError
from hooked_mllm.heads.counting import resolve_count, share_count


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

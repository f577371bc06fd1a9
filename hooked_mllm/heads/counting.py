"""How many of n: an integer is a number, a float is a share of n, rounded up."""

import math
from fractions import Fraction
from numbers import Real

from hooked_mllm.errors import HeadError


def share_count(share: float, n: int) -> int:
    """`ceil(share * n)` of the decimal number: 0.05 of 140 are 7, where the binary product is a little more."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"A share is a number from 0 to 1; got {share!r}.")
    return math.ceil(Fraction(repr(float(share))) * n)


def resolve_count(k: int | float, n: int, what: str = "heads") -> int:
    """The number that `k` means: an integer is the number, a float a share of `n`, rounded up; raises for others."""
    if isinstance(k, bool) or not isinstance(k, Real):
        raise HeadError(f"Expected a number of {what} (int) or a share of them (float); got {k!r}.")
    if isinstance(k, float):
        if not 0.0 <= k <= 1.0:
            raise HeadError(
                f"A float is a share of the {n} {what}, from 0 to 1; got {k!r}. For a number of {what} pass an int."
            )
        return share_count(k, n)
    if not 0 <= k <= n:
        raise HeadError(f"Expected a number of {what} from 0 to {n}; got {k}.")
    return int(k)

"""How many of n: an integer is a number, a float is a share of n, rounded up."""

import math
from fractions import Fraction
from numbers import Real

from hooked_mllm.errors import HeadError


def share_count(share: float, n: int) -> int:
    """`ceil(share * n)`, computed as if `share` were the decimal number that was typed.

    In binary floating point `0.05 * 140` is a little more than 7, and its ceiling 8; here it is 7.

    Args:
        share: Between 0 and 1.
        n: Number of things to take a share of.

    Raises:
        ValueError: for a share outside 0..1.

    Examples:
        >>> share_count(0.05, 140)
        7
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"A share is a number from 0 to 1; got {share!r}.")
    return math.ceil(Fraction(repr(float(share))) * n)


def resolve_count(k: int | float, n: int, what: str = "heads") -> int:
    """The number that `k` asks for among `n`: an integer is a number, a float a share rounded up.

    Args:
        k: 20 for twenty of them, 0.05 for five per cent of them.
        n: How many there are.
        what: What is counted, for the error message.

    Raises:
        HeadError: for a negative number, more than `n`, or a share outside 0..1.

    Examples:
        >>> resolve_count(0.05, 1152), resolve_count(20, 1152)
        (58, 20)
    """
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

"""How many of n: an integer is a number, any other real number a share of n, rounded up; and seeds of draws."""

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_mllm.errors import HeadError, InputError

if TYPE_CHECKING:
    #: a number (int), or a share of all, 0 to 1 (float)
    Count = int | float
    Share = float
    Seed = int
else:  # at run time anything, so that another value reaches the check whose error states what was expected
    Count = Share = Seed = Any

#: the error of a share that was computed in float64 from numbers up to 1, such as 1 - 3 / 7
ROUNDING = 8 * float(np.finfo(np.float64).eps)


def share_count(share: Share, n: int) -> int:
    """The least k with `k / n >= share` in the precision of the share: `ceil(share * n)` without its rounding errors.

    A share that float32 holds exactly is compared in float32, and a NumPy number in its own type.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"A share is a number from 0 to 1; got {share!r}.")
    exact = float(np.float32(share)) == float(share)
    kind: Any = type(share) if isinstance(share, np.floating) else np.float32 if exact else np.float64
    value = float(share) - ROUNDING
    k = max(min(n, int(share > 0)), math.floor(value * n * (1 - float(np.finfo(kind).eps))))
    while k < n and float(kind(k / n)) < value:
        k += 1
    return k


def resolve_count(k: Count, n: int, what: str = "heads") -> int:
    """The number that `k` means: an integer is the number, another number a share of `n`, rounded up."""
    if isinstance(k, bool) or not isinstance(k, Real):
        raise HeadError(f"Expected a number of {what} (int) or a share of them (float); got {k!r}.")
    if not isinstance(k, Integral):
        if not 0.0 <= k <= 1.0:
            raise HeadError(
                f"A float is a share of the {n} {what}, from 0 to 1; got {k!r}. For a number of {what} pass an int."
            )
        return share_count(k, n)
    if not 0 <= k <= n:
        raise HeadError(f"Expected a number of {what} from 0 to {n}; got {k}.")
    return int(k)


def check_seed(seed: Seed) -> int:
    """The seed; raises for anything but an integer of 0 or more."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise InputError(f"A seed is an integer of 0 or more, so that the draw can be repeated; got {seed!r}.")
    return int(seed)

"""How concentrated head scores are: the share of the heads that hold half of the score, and percentiles."""

import numpy as np
from jaxtyping import Float

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.heads.head_values import HeadValues

#: sums of attention in float32 that are equal in exact arithmetic differ by less, relative to their size
ROUNDING = 1e-9


@checked
def rho_half(scores: HeadValues) -> float:
    r"""The least share of the heads that together hold half of all positive score.

    $$\rho_{0.5} = \frac{1}{LH}\min\Big\{k : \sum_{r\le k} s_{(r)}^+ \ge \tfrac12\sum_r s_{(r)}^+\Big\}$$

    $s_{(r)}^+$ is the r-th largest score, and 0 where it is negative; $LH$ are all measured heads. An even distribution
    has 0.5.

    Raises:
        NumericsError: If no score is positive.

    Source: arXiv:2605.27243, for calibrated scores.

    Examples:
        >>> from hooked_mllm import HeadScores
        >>> rho_half(HeadScores([[8.0, 1.0], [1.0, -3.0]]))
        0.25
    """
    values = np.sort(scores.values[scores.measured].clamp(min=0).numpy())[::-1]
    total = values.cumsum()
    if not total[-1] > 0:
        raise NumericsError(f"{scores.name}: no score is positive, so that no head holds a share of them.")
    # the half itself is reached in spite of rounding
    k = int(np.argmax(total >= total[-1] / 2 * (1 - ROUNDING))) + 1
    return k / len(values)


def reached(values: Float[np.ndarray, " value"], percentile: float | int) -> float:
    """The least value that reaches a percentile (0 to 100, by linear interpolation) in spite of rounding."""
    if not 0 <= percentile <= 100:
        raise InputError(f"percentile must be from 0 to 100; got {percentile!r}.")
    threshold = float(np.percentile(values, percentile))
    return float(values[values >= threshold - ROUNDING * float(np.ptp(values))].min())

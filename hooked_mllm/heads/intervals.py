"""Intervals of means over samples, made for few and skewed samples."""

import numpy as np
from jaxtyping import Float

from hooked_mllm.errors import InputError
from hooked_mllm.heads.counting import Seed, check_seed

#: intervals of fewer samples hold the true mean too seldom
MIN_SAMPLES = 5
#: numbers drawn at a time, so that the resampled means of a large model stay small
CHUNK = 1 << 22


def are_shares(values: Float[np.ndarray, "..."]) -> bool:
    """Whether all values are 0 or 1 and some are 1, as of an accuracy; zeros alone may be of a signed score."""
    measured = values[~np.isnan(values)]
    return bool(np.isin(measured, (0, 1)).all() and measured.any())


def mean_interval(
    values: Float[np.ndarray, "sample item"], level: float = 0.95, n: int = 1000, seed: Seed = 0, bounded: bool = True
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    r"""Ends of an interval around the mean of each item.

    Studentised bootstrap: of `n` resamples, the same for all items, the quantiles of $t^* = (\bar x^* - \bar x) / s^*$
    give $[\bar x - t^*_{1-a/2}\, s,\; \bar x - t^*_{a/2}\, s]$, s being the standard error. $a = (1 - \text{level})
    \cdot N / (N + 12)$ compensates for what few samples (N) do not show of a skewed distribution. With `bounded`
    (the score is known to lie in [0, 1]), the interval of items that are all 0 or 1 is Clopper and Pearson's. Samples
    of -1 and 0, and very heavy tails, are covered less often than stated: 0.68 to 0.9 for a level of 0.95.

    Raises:
        InputError: For fewer than 5 samples, a level that is not between 0 and 1, no draw, or no seed.
    """
    n_samples = len(values)
    if n_samples < MIN_SAMPLES:
        raise InputError(
            f"An interval needs {MIN_SAMPLES} samples at least, since one of fewer does not contain the true mean as "
            f"often as it states; got {n_samples}. Measure more samples."
        )
    if not 0.0 < level < 1.0 or n < 1:
        raise InputError(f"Expected a level between 0 and 1 and at least one draw; got level={level!r}, n={n!r}.")
    shares = np.full(n_samples, 1 / n_samples)
    weights = np.random.default_rng(check_seed(seed)).multinomial(n_samples, shares, size=n) / n_samples
    low, high = np.empty((2, values.shape[1]))
    step = max(1, CHUNK // n)
    for start in range(0, values.shape[1], step):
        part = slice(start, start + step)
        low[part], high[part] = _studentised(values[:, part], weights, (1 - level) * n_samples / (n_samples + 12))
    binary = ((values == 0) | (values == 1)).all(0) & bounded
    if binary.any():
        from scipy.stats import beta

        hits = values[:, binary].sum(0)
        misses, tails = n_samples - hits, [[(1 - level) / 2], [(1 + level) / 2]]
        ends = beta.ppf(tails, [hits, hits + 1], [misses + 1, misses])
        low[binary], high[binary] = np.where(hits == 0, 0.0, ends[0]), np.where(misses == 0, 1.0, ends[1])
    return low, high


def _studentised(
    values: Float[np.ndarray, "sample item"], weights: Float[np.ndarray, "draw sample"], a: float
) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    n_samples, mean = len(values), values[0] + (values - values[0]).mean(0)  # exact for equal values
    centred = values - mean
    error = centred.std(0, ddof=1) / np.sqrt(n_samples)
    shift = weights @ centred  # [draw item]
    spread = np.sqrt((weights @ centred**2 - shift**2).clip(min=0) / (n_samples - 1))
    # a resample of equal values has no spread: it is taken to be a tenth of the samples'
    t = np.divide(shift, spread.clip(min=error / 10), out=np.zeros_like(shift), where=error > 0)
    t_low, t_high = np.quantile(t, [a / 2, 1 - a / 2], axis=0)
    return mean - t_high * error, mean - t_low * error

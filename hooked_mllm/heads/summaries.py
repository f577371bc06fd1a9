"""What a whole map of head scores says in few numbers: concentration, intervals, and agreement across seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads.head_scores import HeadScores, ScoresInput, check_scores
from hooked_mllm.heads.sample_scores import SampleScores

#: numbers drawn at a time, so that the resampled means of a large model stay small
CHUNK = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean score per head, and an interval around it.

    Args:
        mean: The mean over all samples.
        low: Lower end for every head.
        high: Upper end for every head.
        level: Share of the resampled means inside, such as 0.95.
    """

    mean: HeadScores
    low: HeadScores
    high: HeadScores
    level: float

    def __getitem__(self, head: tuple[int, int] | str) -> tuple[float, float]:
        """(low, high) of one head."""
        return self.low[head], self.high[head]


def bootstrap(scores: SampleScores, n: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    r"""Percentile bootstrap: the interval that holds a share `level` of the means of resampled samples.

    Each of `n` times, as many samples as there are get drawn with replacement, the same for all heads, and averaged;
    low and high are the $(1\mp\text{level})/2$ quantiles of these means, by linear interpolation.

    Raises:
        InputError: For fewer than two samples, a level that is not between 0 and 1, or no draw.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Examples:
        >>> from hooked_mllm.heads import SampleScores
        >>> interval = bootstrap(SampleScores([[[0.1, 0.4]], [[0.3, 0.4]]]), n=50)
        >>> interval["L0H1"]
        (0.4, 0.4)
    """
    n_samples = len(scores)
    if n_samples < 2:
        raise InputError(f"A bootstrap needs at least two samples; {scores!r} has {n_samples}.")
    if not 0.0 < level < 1.0 or n < 1:
        raise InputError(f"Expected a level between 0 and 1 and at least one draw; got level={level!r}, n={n!r}.")
    flat = scores.values.flatten(1)
    generator = np.random.default_rng(seed)
    weights = torch.from_numpy(generator.multinomial(n_samples, np.full(n_samples, 1 / n_samples), size=n) / n_samples)
    low, high = np.empty(flat.shape[1]), np.empty(flat.shape[1])
    step = max(1, CHUNK // n)
    for start in range(0, flat.shape[1], step):
        part = slice(start, start + step)
        ends = np.quantile((weights @ flat[:, part]).numpy(), [(1 - level) / 2, (1 + level) / 2], axis=0)
        low[part], high[part] = ends
    facts = {**scores.provenance, "bootstrap": {"n": n, "level": level, "seed": seed, "n_samples": n_samples}}

    def ends_of(values: np.ndarray, end: str) -> HeadScores:
        shaped = values.reshape(scores.shape)
        return HeadScores(shaped, name=f"{scores.name} {end}", provenance=facts, missing=scores.missing)

    return Interval(scores.mean(), ends_of(low, "low"), ends_of(high, "high"), level)


@dataclass(frozen=True)
class Overlap:
    """How far rankings agree on their top heads.

    Args:
        matrix: Share of the top heads of ranking i that are in the top of ranking j, [ranking ranking].
        k: The number of heads compared, as asked for (int) or as a share (float).
    """

    matrix: Float[np.ndarray, "ranking ranking"]
    k: int | float

    @property
    def mean(self) -> float:
        """The mean over all pairs of different rankings."""
        return float(self.matrix[~np.eye(len(self.matrix), dtype=bool)].mean())


def pairwise_overlap(rankings: Sequence[ScoresInput], k: int | float) -> Overlap:
    """The overlap of the top `k` heads between all pairs of scores, such as those of several seeds.

    Raises:
        InputError: For fewer than two scores.
        HeadError: If their shapes differ, or for k of no heads or too many.

    Examples:
        >>> from hooked_mllm import HeadScores
        >>> pairwise_overlap([HeadScores([[3, 2, 1]]), HeadScores([[3, 1, 2]])], k=2).mean
        0.5
    """
    if len(rankings) < 2:
        raise InputError(f"An overlap needs two rankings at least; got {len(rankings)}.")
    scores = [check_scores(ranking, "An overlap") for ranking in rankings]
    return Overlap(np.array([[row.overlap(column, k) for column in scores] for row in scores]), k)


def overlap_across_seeds(
    scores: SampleScores, k: int | float, n_samples: int | float = 0.5, seeds: Sequence[int] = range(5)
) -> Overlap:
    """How far the top `k` heads depend on the samples: overlap between draws of `n_samples` of them, one per seed.

    Draws of different seeds share samples; for disjoint ones, use `pairwise_overlap`.

    Args:
        scores: The scores of every sample.
        k: Number (int) or share (float) of the heads.
        n_samples: Number (int) or share (float) of the samples in each draw.
        seeds: One draw each.

    Raises:
        InputError: For fewer than two seeds, or a repeated seed.
        HeadError: For no heads or samples, or too many.
    """
    if len(set(seeds)) != len(seeds):
        raise InputError(f"Every seed counts once; got {list(seeds)}.")
    try:
        return pairwise_overlap([scores.draw(n_samples, seed) for seed in seeds], k)
    except HeadError as error:
        raise HeadError(f"{scores!r}: {error}") from None

"""Bootstrap intervals of heads, and overlaps against their definitions in NumPy."""

import numpy as np
import pytest
import torch

from hooked_mllm.errors import CacheFileError, HeadError, InputError, NumericsError
from hooked_mllm.heads import HeadScores, SampleScores, bootstrap, overlap_across_seeds, pairwise_overlap
from hooked_mllm.heads.intervals import mean_interval


def samples(n: int = 12, noise: float = 0.3, seed: int = 0) -> SampleScores:
    rng = np.random.default_rng(seed)
    return SampleScores(rng.normal(size=(3, 8)) + noise * rng.normal(size=(n, 3, 8)), name="RAM")


def test_bootstrap_is_an_interval_around_each_mean():
    scores = samples()
    interval = bootstrap(scores, n=400, level=0.9, seed=3)
    low, high = mean_interval(scores.values.flatten(1).numpy(), 0.9, 400, 3)
    np.testing.assert_array_equal(interval.low.values, low.reshape(3, 8))
    np.testing.assert_array_equal(interval.high.values, high.reshape(3, 8))
    np.testing.assert_allclose(interval.mean.values, scores.values.mean(0), atol=1e-15)
    assert interval["L1H2"] == (interval.low[1, 2], interval.high[1, 2]) and interval.level == 0.9
    assert interval.low.provenance["bootstrap"] == {"n": 400, "level": 0.9, "seed": 3, "n_samples": 12}
    assert torch.equal(bootstrap(scores, n=400, level=0.9, seed=3).low.values, interval.low.values)
    assert not torch.equal(bootstrap(scores, n=400, level=0.9, seed=4).low.values, interval.low.values)


def test_overlap_matrix():
    rankings = [samples(seed=s).mean() for s in range(3)]
    found = pairwise_overlap(rankings, 5)
    for i, one in enumerate(rankings):
        for j, other in enumerate(rankings):
            top, other_top = (set(np.argsort(-r.values.numpy().ravel(), kind="stable")[:5]) for r in (one, other))
            assert found.matrix[i, j] == len(top & other_top) / 5
    assert found.mean == pytest.approx((found.matrix.sum() - 3) / 6) and found.mean < 1


def test_overlap_across_seeds_grows_with_the_samples():
    scores = samples(n=40, noise=3.0)
    few, many = (overlap_across_seeds(scores, 0.25, n, seeds=range(8)).mean for n in (2, 36))
    assert few < many <= 1
    assert overlap_across_seeds(scores, 6, 40).mean == 1.0  # the same samples in every draw
    drawn = scores.draw(0.25, seed=5)
    chosen = drawn.provenance["samples_drawn"]
    assert len(set(chosen)) == 10 and drawn.provenance["seed"] == 5
    np.testing.assert_allclose(drawn.values, scores.values[chosen].mean(0))
    assert drawn.counts.eq(10).all()


def test_layers_not_measured_stay_missing(tmp_path):
    values = samples().values.clone()
    values[:, 1] = torch.nan
    scores = SampleScores(values, provenance={"seed": 1})
    found = bootstrap(scores, n=20)
    assert found.low.missing == scores.mean().missing == (1,)
    assert scores.mean().counts[:, 0].tolist() == [12, 0, 12]
    scores.save(tmp_path / "s.safetensors")
    again = SampleScores.load(tmp_path / "s.safetensors")
    assert torch.equal(again.values.nan_to_num(9), values.nan_to_num(9)) and again.provenance == {"seed": 1}
    HeadScores(np.ones((2, 2))).save(tmp_path / "h")
    with pytest.raises(CacheFileError):
        SampleScores.load(tmp_path / "h.safetensors")
    assert repr(scores) == "SampleScores(scores, 12 samples of 3 x 8 layers x heads)"


def test_bad_input_is_rejected():
    scores = samples()
    for options in ({"level": 1.0}, {"level": 0.0}, {"n": 0}):
        with pytest.raises(InputError, match="level between 0 and 1"):
            bootstrap(scores, **options)
    with pytest.raises(InputError, match="needs 5 samples at least"):
        bootstrap(samples(n=4))
    with pytest.raises(InputError, match="two rankings"):
        pairwise_overlap([scores.mean()], 3)
    with pytest.raises(InputError, match="counts once"):
        overlap_across_seeds(scores, 3, seeds=[1, 1])
    with pytest.raises(HeadError, match="no sample"):
        scores.draw(0, 0)
    with pytest.raises(HeadError, match="from 0 to 12"):
        overlap_across_seeds(scores, 3, 13)
    with pytest.raises(HeadError, match=r"\[sample layer head\]"):
        SampleScores(np.ones((2, 2)))
    bad = scores.values.clone()
    bad[4, 1, 2] = torch.inf
    with pytest.raises(NumericsError, match="L1H2 in sample 4"):
        SampleScores(bad)


def test_zeros_alone_may_be_of_a_signed_score():
    zero = bootstrap(SampleScores(np.zeros((8, 1, 2))))
    assert zero["L0H0"] == (0.0, 0.0)
    signed = np.zeros((8, 1, 2))
    signed[0, 0, 1] = -1
    assert bootstrap(SampleScores(signed))["L0H0"] == (0.0, 0.0)
    accuracy = np.zeros((8, 1, 2))
    accuracy[0, 0, 1] = 1
    assert bootstrap(SampleScores(accuracy))["L0H0"] == (0.0, pytest.approx(1 - 0.025 ** (1 / 8)))
    facts = bootstrap(SampleScores(accuracy), n=np.int64(50), level=np.float32(0.5), seed=np.int64(0)).low.provenance
    assert [type(facts["bootstrap"][name]) for name in ("n", "level", "seed")] == [int, float, int]

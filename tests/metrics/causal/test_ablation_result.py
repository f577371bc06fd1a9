"""What an ablation curve keeps: means, intervals, a table, a file."""

import numpy as np
import pytest

from hooked_mllm.errors import CacheFileError, HeadError, InputError
from hooked_mllm.heads.intervals import mean_interval
from hooked_mllm.metrics import AblationCurveResult
from hooked_mllm.metrics.causal.ablation_result import KIND
from hooked_mllm.storage import read_json, write_json


@pytest.fixture
def curve():
    rng = np.random.default_rng(0)
    values = {
        "top": rng.random((1, 3, 12)),
        "random": rng.random((2, 3, 12)),
    }
    values["random"][:, 0] = values["top"][0, 0]
    values["random"][:, 2] = np.nan
    heads = {"top": [["", "L0H0", "L0H0, L1H1"]], "random": [["", "L0H1", None], ["", "L0H3", None]]}
    return AblationCurveResult(
        (0, 1, 2), values, heads, [[0, 0, None], [0, 0, None]], "AnswerLogProb", True, {"n_samples": 12}
    )


def test_means_over_samples_and_seeds(curve):
    assert curve.rankings == ("top", "random") and curve.n_samples == 12
    assert curve.clean == pytest.approx(sum(curve.per_sample["top"][0, 0]) / 12)
    both = curve.per_sample["random"]
    assert curve.at("random", 1) == pytest.approx((both[0, 1].sum() + both[1, 1].sum()) / 24)
    np.testing.assert_allclose(curve.values["random"][1, 1], both[1, 1].mean())
    assert np.isnan(curve.at("random", 2))
    with pytest.raises(HeadError, match=r"7 heads were not ablated; the curve has k in \[0, 1, 2\]"):
        curve.at("top", 7)
    with pytest.raises(InputError, match="one of the rankings top, random; got 'bottom'"):
        curve.mean("bottom")


def test_the_interval_is_that_of_the_mean_over_seeds(curve):
    low, high = curve.interval("random", level=0.8, n=4000)
    expected = mean_interval(curve.per_sample["random"].mean(0)[:2].T, 0.8, 4000)
    np.testing.assert_allclose([low[:2], high[:2]], expected, rtol=1e-12)
    assert np.isnan(low[2]) and np.isnan(high[2])
    assert (low[:2] < curve.mean("random")[:2]).all() and (curve.mean("random")[:2] < high[:2]).all()
    np.testing.assert_array_equal(curve.interval("top")[0], curve.interval("top")[0])
    assert (curve.interval("top", level=0.5)[0] > curve.interval("top", level=0.99)[0]).all()


def test_an_accuracy_of_1_is_not_known_to_be_1():
    right = AblationCurveResult((0,), {"top": np.ones((1, 1, 8))}, {"top": [[""]]})
    low, high = right.interval("top")
    assert high[0] == 1.0 and low[0] == pytest.approx(0.025 ** (1 / 8))  # (1 - x)^8 of 8 hits in 8


def test_intervals_that_cannot_be(curve):
    one = AblationCurveResult((0,), {"top": np.ones((1, 1, 1))}, {"top": [[""]]})
    with pytest.raises(InputError, match="needs 5 samples at least.*got 1"):
        one.interval("top")
    for wrong in ({"level": 1.0}, {"level": 0.0}, {"n": 0}):
        with pytest.raises(InputError, match="between 0 and 1 and at least one draw"):
            curve.interval("top", **wrong)
    assert one.table().split() == ["heads", "top", "0", "1.000"]


def test_the_table(curve):
    head, *rows = curve.table().splitlines()
    assert head.split() == ["heads", "top", "random"] and [r.split()[0] for r in rows] == ["0", "1", "2"]
    low, high = curve.interval("top")
    assert f"{curve.at('top', 2):.3f} [{low[2]:.3f}, {high[2]:.3f}]" in rows[2] and rows[2].endswith(" -")
    assert repr(curve).startswith("AblationCurveResult(AnswerLogProb, k from 0 to 2, 12 samples; at k=2: top 0.")


def test_it_is_read_from_a_file(curve, tmp_path):
    path = tmp_path / "curve.json"
    curve.save(path)
    back = AblationCurveResult.load(path)
    for name in curve.rankings:
        np.testing.assert_array_equal(back.per_sample[name], curve.per_sample[name])
    for name in ("ks", "heads", "moved", "objective", "larger_is_better", "provenance"):
        assert getattr(back, name) == getattr(curve, name)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("ks"),
        lambda c: c.pop("heads"),
        lambda c: c["ks"].append(4),
        lambda c: c["per_sample"].clear(),
        lambda c: c["per_sample"].update(top=[[1.0]]),
        lambda c: c.update(per_sample=[1]),
    ],
)
def test_damaged_files(curve, tmp_path, change):
    path = tmp_path / "curve.json"
    curve.save(path)
    content = read_json(path, KIND)
    change(content)
    write_json(path, KIND, content)
    with pytest.raises(CacheFileError, match="is damaged"):
        AblationCurveResult.load(path)


def test_zeros_are_an_accuracy_only_where_the_objective_is_one():
    values = {"top": np.zeros((1, 1, 8))}
    accuracy = AblationCurveResult((0,), values, {"top": [[""]]}, objective="GreedyAccuracy")
    assert accuracy.interval("top")[1][0] == pytest.approx(1 - 0.025 ** (1 / 8))
    assert AblationCurveResult((0,), values, {"top": [[""]]}).interval("top")[1][0] == 0.0

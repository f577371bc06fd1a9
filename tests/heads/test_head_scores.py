"""HeadScores: ranking, controls, comparison and what is rejected."""

from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from hooked_mllm.errors import HeadError, InputError, NumericsError
from hooked_mllm.heads import HeadScores, HeadSet


def scores(seed=0, n_layers=6, n_heads=8, **options):
    values = np.random.default_rng(seed).random((n_layers, n_heads))
    return HeadScores(values, **{"name": "RAM", **options})


@pytest.mark.parametrize("k", [0, 1, 7, 48, 0.0, 0.05, 0.5, 1.0])
def test_top_and_bottom_follow_numpy(k):
    s = scores()
    n = k if isinstance(k, int) else int(np.ceil(k * 48))
    order = np.argsort(-s.values.numpy().ravel(), kind="stable")
    assert [layer * 8 + head for layer, head in s.top(k)] == order[:n].tolist()
    assert [layer * 8 + head for layer, head in s.bottom(k)] == order[::-1][:n].tolist()


def test_ties_go_to_the_lower_layer_then_head():
    s = HeadScores([[0.5, 0.7, 0.5], [0.7, 0.5, 0.5]])
    assert str(s.top(4)) == "L0H1, L1H0, L0H0, L0H2"
    assert str(s.bottom(3)) == "L0H0, L0H2, L1H1"


@pytest.mark.parametrize("k", [49, -1, 1.5, -0.1, True])
def test_more_heads_than_there_are(k):
    with pytest.raises(HeadError, match=r"Expected a number|A float is a share"):
        scores().top(k)


def test_random_heads_have_the_layers_of_the_ranked_ones_and_none_of_them():
    s = scores()
    core = s.top(9)
    seen = set()
    for seed in range(20):
        control = s.random(seed=seed, like=core)
        assert control == s.random(seed=seed, like=core)
        assert not control & core
        assert Counter(layer for layer, _ in control) == Counter(layer for layer, _ in core)
        seen.add(control)
    assert len(seen) > 10


def test_random_heads_by_number():
    s = scores()
    assert len(s.random(5, 3)) == len(s.random(0.1, 3)) == 5
    rest = s.random(48 - 10, 1, exclude=s.top(10))
    assert rest | s.top(10) == s.top(48)
    assert s.random(9, seed=2, like=s.top(9)) == s.random(seed=2, like=s.top(9))


def test_random_heads_that_do_not_exist():
    s = scores()
    crowded = HeadSet([(2, head) for head in range(5)], n_layers=6, n_heads=8)
    with pytest.raises(HeadError, match="Layer 2: `like` has 5 heads there, but only 3 of 8 are left"):
        s.random(seed=0, like=crowded)
    assert len(s.random(seed=0, like=crowded, exclude=HeadSet(n_layers=6, n_heads=8))) == 5
    with pytest.raises(HeadError, match="needs a number of heads"):
        s.random()
    with pytest.raises(HeadError, match="disagrees"):
        s.random(3, like=s.top(4))
    with pytest.raises(HeadError, match="only 8 are left"):
        s.random(9, exclude=s.top(40))
    with pytest.raises(HeadError, match="layers x heads"):
        s.random(like=HeadSet(n_layers=1, n_heads=1))


def test_spearman_with_ties_is_scipys():
    rng = np.random.default_rng(3)
    a, b = (HeadScores(rng.integers(0, 6, (6, 8)).astype(float)) for _ in range(2))
    expected = stats.spearmanr(a.values.ravel(), b.values.ravel()).statistic
    assert a.spearman(b) == pytest.approx(expected)
    assert a.spearman(a * 3 - 1) == pytest.approx(1.0)
    assert a.spearman(-a) == pytest.approx(-1.0)


def test_comparisons_reject_what_is_not_defined():
    s = scores()
    with pytest.raises(NumericsError, match="All scores of flat are equal"):
        s.spearman(HeadScores(np.ones((6, 8)), name="flat"))
    for compare in (s.spearman, lambda other: s.overlap(other, 3), lambda other: s + other):
        with pytest.raises(HeadError, match="6 x 8 and RAM 6 x 7"):
            compare(scores(n_heads=7))
    with pytest.raises(HeadError, match="at least one head"):
        s.overlap(s, 0)


def test_overlap_is_the_share_of_common_heads():
    a = HeadScores([[4.0, 3.0, 2.0, 1.0]])
    b = HeadScores([[4.0, 1.0, 3.0, 2.0]])
    assert [a.overlap(b, k) for k in (1, 2, 3, 1.0)] == [1.0, 0.5, 2 / 3, 1.0]


def test_overlap_is_symmetric_where_measured_layers_differ():
    a = HeadScores([[4.0, 3.0], [9.0, 8.0], [2.0, 1.0]], missing=[1])
    b = HeadScores([[1.0, 4.0], [3.0, 2.0], [9.0, 8.0]], missing=[2])
    assert a.overlap(b, 1) == b.overlap(a, 1) == 0.0  # among the two heads of layer 0: L0H0 and L0H1
    assert a.overlap(b, 0.5) == b.overlap(a, 0.5) == 0.0 and a.overlap(b, 2) == b.overlap(a, 1.0) == 1.0
    with pytest.raises(HeadError, match="from 0 to 2; got 3"):
        a.overlap(b, 3)
    whole = HeadScores([[4.0, 3.0], [9.0, 8.0], [2.0, 1.0]])
    assert a.overlap(whole, 0.5) == whole.overlap(a, 0.5) == 1.0


def test_controls_never_hold_the_heads_that_they_control():
    s = scores()
    core, others = s.top(4), s.bottom(20)
    for seed in range(30):
        assert not s.random(seed=seed, like=core, exclude=others) & (core | others)
    for seed in (None, 1.5, -1, True):
        with pytest.raises(InputError, match="A seed is an integer of 0 or more"):
            s.random(3, seed)


def test_values_that_specify_no_heads():
    s = scores()
    for select in (s.top, s.bottom):
        with pytest.raises(HeadError, match="Expected a number of measured heads .* got None"):
            select(None)
    assert s.top(np.float32(0.05)) == s.top(0.05) == s.top(3)
    for heads in (HeadSet(["L1H1"], n_layers=2, n_heads=4), [HeadSet(["L1H1"], n_layers=6, n_heads=9)]):
        with pytest.raises(HeadError, match="belong to a model of"):
            s.mean(heads)


def test_percentile_mask_is_not_a_matter_of_rounding():
    s = HeadScores(np.arange(101.0)[None] / 101)
    for percentile in range(101):  # 7 % of 100 gaps are 7.000000000000001 in floating point
        assert int(s.percentile_mask(percentile).sum()) == 101 - percentile
    with pytest.raises(InputError, match="percentile must be from 0 to 100; got nan"):
        s.percentile_mask(float("nan"))


def test_percentile_mask_interpolates_linearly():
    s = scores()
    threshold = np.percentile(s.values.numpy(), 95)
    assert np.array_equal(s.percentile_mask().numpy(), s.values.numpy() >= threshold)
    assert s.percentile_mask(0).all()


def test_missing_layers_take_no_part():
    values = np.arange(12.0).reshape(3, 4)
    values[2] = np.nan
    s = HeadScores(values, missing=[2])
    assert str(s.top(2)) == "L1H3, L1H2" and len(s.ranking) == 8
    assert len(s.top(0.5)) == 4
    assert not s.percentile_mask(50)[2].any()
    assert (s + HeadScores(np.ones((3, 4)), missing=[0])).missing == (0, 2)
    assert s.mean() == np.arange(8.0).mean()
    with pytest.raises(HeadError, match="Layer 2 was not measured"):
        s[2, 0]
    with pytest.raises(HeadError, match="Expected a number of measured heads from 0 to 8; got 9"):
        s.top(9)


def test_indexing_and_mean():
    s = scores()
    assert s[2, 3] == s["L2H3"] == s[(2, 3)] == float(s.values[2, 3])
    assert torch.equal(s[2], s.values[2])
    core = s.top(5)
    assert s.mean(core) == pytest.approx(np.sort(s.values.numpy().ravel())[-5:].mean())
    assert s.mean([2, 3]) == s.mean("L2H3") == s[[2, 3]]
    for head in ((6, 0), "L0H8", "best", 6):
        with pytest.raises(HeadError):
            s[head]
    with pytest.raises(HeadError, match="empty set"):
        s.mean(s.top(0))


def test_text():
    s = HeadScores([[0.25, 0.5], [0.125, 0.75]], name="RAM")
    assert repr(s) == "HeadScores(RAM, 2 x 2 layers x heads, top: L1H1 0.75, L0H1 0.5, L0H0 0.25)"
    assert s.table(2).splitlines() == ["rank  head      RAM", "   1  L1H1      0.75", "   2  L0H1      0.5"]


def test_plot_is_a_figure_of_all_heads():
    figure = scores().plot()
    assert figure.axes[0].images or figure.axes[0].collections


def test_names_of_measured_heads_are_offered_as_keys():
    scores = HeadScores([[0.1, 0.2], [0.3, 0.4]], missing=[0])
    assert scores._ipython_key_completions_() == ["L1H0", "L1H1"]
    assert [scores[name] for name in scores._ipython_key_completions_()] == [0.3, 0.4]

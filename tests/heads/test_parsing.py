"""Heads become a HeadSet of the model's shape, or numbers within one layer."""

import numpy as np
import pytest
import torch

from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadScores, HeadSet, heads_in_layer, pairwise_overlap, parse_heads
from hooked_mllm.heads.head_scores import check_scores
from hooked_mllm.metrics import AblationCurve, KeyTokenCoverage, stability
from hooked_mllm.metrics.causal import random_control

SHAPE = (5, 4)
SET = HeadSet(["L2H3", "L0H1"], n_layers=5, n_heads=4)


@pytest.mark.parametrize("heads", ["L2H3, L0H1", [(2, 3), "L0H1"], SET, {2: [3], 0: [1]}, SET.to_mask()], ids=str)
def test_a_set_of_the_shape(heads):
    parsed = parse_heads(heads, SHAPE)
    assert isinstance(parsed, HeadSet) and parsed == SET and parsed.shape == SHAPE


def test_without_a_shape_pairs_stay_pairs():
    assert parse_heads("L2H3, L0H1") == ((2, 3), (0, 1))
    assert parse_heads(SET) is SET and parse_heads(SET, SHAPE) is SET
    assert parse_heads(SET.to_mask().numpy()) == SET


def test_no_head_where_one_is_needed():
    for empty in ("", [], SET[:0], torch.zeros(SHAPE, dtype=torch.bool)):
        assert len(parse_heads(empty, SHAPE)) == 0
        with pytest.raises(HeadError, match="The set of heads is empty"):
            parse_heads(empty, SHAPE, allow_empty=False)


def test_errors_state_whose_shape_and_what_to_do():
    for heads in (SET, SET.to_mask()):
        with pytest.raises(HeadError, match=r"5 x 4 \(layers x heads\); the vision tower has 2 x 2\."):
            parse_heads(heads, (2, 2), whose="the vision tower")
    with pytest.raises(HeadError, match=r"this model has 2 x 2\. Rank them anew\."):
        parse_heads(SET, (2, 2), hint="Rank them anew.")


@pytest.mark.parametrize(
    ("heads", "numbers"),
    [
        (3, [3]),
        (np.int64(3), [3]),
        (-1, [3]),
        ([2, 0, 2], [2, 0, 2]),
        ((2, 3), [2, 3]),
        (range(2), [0, 1]),
        (np.array([1, 2]), [1, 2]),
        (torch.tensor([1, 2]), [1, 2]),
        ([True, False, False, True], [0, 3]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ("L2H3", [3]),
        ("L2H3, L2H0", [3, 0]),
        ([(2, 3), "L2H0"], [3, 0]),
        (SET, [3]),
        (SET.to_mask(), [3]),
        ({2: [1, 3]}, [1, 3]),
        ([], []),
    ],
    ids=str,
)
def test_heads_of_one_layer(heads, numbers):
    assert heads_in_layer(heads, 2, SHAPE) == numbers


def test_an_iterator_is_read_once():
    assert heads_in_layer(iter([2, 0]), 2, SHAPE) == [2, 0]
    assert heads_in_layer(iter(["L2H1"]), 2, SHAPE) == [1]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (4, "Head 4 is not there: heads of layer 2 are 0 to 3"),
        ([0, -5], "Head -5 is not there"),
        ("L3H1", "Expected heads of layer 2; got L3H1"),
        (["L2H0", (1, 1)], "Expected heads of layer 2; got L1H1"),
        ("L2H4", "Head 4 of L2H4 is not there"),
        (SET[1:], "has no head in layer 2"),
        (HeadSet(["L2H1"], n_layers=9, n_heads=4), "this model has 5 x 4"),
        ([True, False], "Expected a head"),
        (None, "Expected a head"),
        (1.0, "Expected a head"),
        ([0.5], "Expected a head"),
        ("all", "written like 'L20H15'"),
    ],
    ids=str,
)
def test_heads_that_the_layer_lacks(heads, message):
    with pytest.raises(HeadError, match=message):
        heads_in_layer(heads, 2, SHAPE)


def test_scores_are_checked_by_type():
    scores = HeadScores([[0.1, 0.2]])
    assert check_scores(scores, "A curve") is scores
    with pytest.raises(HeadError, match="A curve needs HeadScores, .* got HeadSet"):
        check_scores(SET, "A curve")


# -- functions that take heads -----------------------------------------------------------------------------------------

SCORES = HeadScores(np.random.default_rng(0).random(SHAPE), name="RAM")
WAYS = [SET, "L2H3, L0H1", [(2, 3), "L0H1"], SET.to_mask(), SET.to_mask().tolist(), {2: [3], 0: 1}]


@pytest.mark.parametrize("heads", WAYS, ids=lambda heads: type(heads).__name__)
def test_scores_take_heads_in_every_form(heads):
    assert SCORES.mean(heads) == pytest.approx((float(SCORES.values[2, 3]) + float(SCORES.values[0, 1])) / 2)
    assert SCORES.random(seed=3, like=heads) == SCORES.random(seed=3, like=SET)
    assert SCORES.random(18, exclude=heads) & SET == HeadSet(n_layers=5, n_heads=4)
    assert random_control(SCORES, heads, seed=1) == random_control(SCORES, SET, seed=1)


def test_one_head_of_scores():
    value = float(SCORES.values[2, 3])
    assert SCORES.mean((2, 3)) == SCORES.mean("L2H3") == SCORES[2, 3] == SCORES["L2H3"] == value
    assert SCORES[np.int64(2), np.int32(3)] == SCORES[[2, 3]] == SCORES[torch.tensor([2, 3])] == value
    assert torch.equal(SCORES[np.int64(2)], SCORES.values[2])


@pytest.mark.parametrize("head", [None, True, 2.0, (2,), (2, 3, 1), "L2H3, L0H1", SET, (2.0, 3)], ids=str)
def test_what_is_no_head_of_scores(head):
    with pytest.raises(HeadError, match="Expected a head"):
        SCORES[head]


def test_scores_of_another_model_have_other_heads():
    other = HeadSet([(0, 0)], n_layers=2, n_heads=2)
    for take in (SCORES.mean, lambda heads: SCORES.random(like=heads), lambda heads: SCORES.random(1, exclude=heads)):
        with pytest.raises(HeadError, match=r"model of 2 x 2 .*; RAM has 5 x 4"):
            take(other)
    for compare in (SCORES.spearman, lambda value: SCORES.overlap(value, 2)):
        for value in (None, 3, SET):
            with pytest.raises(HeadError, match=f"Expected HeadScores to compare RAM with; got {type(value).__name__}"):
                compare(value)


def test_functions_of_scores_reject_other_values():
    for function in (
        lambda value: pairwise_overlap([SCORES, value], 2),
        lambda value: random_control(value, SET, 0),
        lambda value: AblationCurve(value),
        lambda value: stability({"a": SCORES, "b": value}),
    ):
        with pytest.raises(HeadError, match="needs HeadScores, such as .* got HeadSet"):
            function(SET)


def test_a_set_is_made_of_heads_in_every_form():
    for heads in WAYS:
        if isinstance(heads, str):
            with pytest.raises(HeadError, match="HeadSet.parse"):
                HeadSet(heads, n_layers=5, n_heads=4)
        else:
            assert HeadSet(heads, n_layers=5, n_heads=4) == SET
    assert HeadSet((2, 3), n_layers=np.int64(5), n_heads=4) == SET[:1]
    assert HeadSet(SET, n_layers=9, n_heads=9).shape == (9, 9)  # a named shape is meant
    assert HeadSet.from_mask(SET.to_mask().numpy()) == HeadSet.from_mask(SET.to_mask().tolist()) == SET
    with pytest.raises(HeadError, match="Expected a head"):
        HeadSet.from_mask(np.array([[0, 1, 1], [0, 1, 0]]))


def test_a_coverage_curve_takes_a_ranking_in_every_form():
    assert KeyTokenCoverage(SET).ranking is SET
    assert KeyTokenCoverage(SET.to_mask().numpy()).ranking == SET
    assert KeyTokenCoverage("L2H3, L0H1").ranking == ((2, 3), (0, 1))
    assert KeyTokenCoverage("L2H3, L0H1").config()["ranking"] == "L2H3, L0H1"

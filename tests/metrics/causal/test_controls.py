"""Random controls: as many heads, in the same layers, none of the ranked ones; and where that cannot be."""

from collections import Counter

import pytest
import torch

from hooked_mllm import HeadScores, HeadSet
from hooked_mllm.errors import HeadError
from hooked_mllm.metrics.causal import random_control

SCORES = HeadScores(torch.rand(5, 8, generator=torch.Generator().manual_seed(3)))


def layers(heads):
    return Counter(layer for layer, _ in heads)


@pytest.mark.parametrize("k", [0, 1, 4, 7])
def test_it_has_the_layers_of_the_ranked_heads_and_none_of_them(k):
    ranked, seen = SCORES.top(k), set()
    for seed in range(5):
        control = random_control(SCORES, ranked, seed)
        assert layers(control.heads) == layers(ranked) and control.moved == 0
        assert not control.heads & ranked
        assert control.heads == SCORES.random(like=ranked, seed=seed)  # which needs enough heads left in each layer
        assert control == random_control(SCORES, ranked, seed)
        seen.add(control.heads)
    assert (len(seen) > 1) == (k > 0)


def test_a_layer_without_enough_heads_left_borrows_from_others():
    scores = HeadScores([[9, 8, 7, 1], [2, 3, 0, 4]])
    control = random_control(scores, scores.top(3), seed=0)
    assert (0, 3) in control.heads and control.moved == 2
    assert layers(control.heads) == {0: 1, 1: 2} and not control.heads & scores.top(3)
    drawn = {random_control(scores, scores.top(3), seed).heads for seed in range(20)}
    assert len(drawn) == 6  # L0H3 and any two of layer 1


def test_where_fewer_heads_are_left_than_were_ranked_there_is_none():
    scores = HeadScores([[9, 8, 7], [2, 3, 0]])
    assert set(random_control(scores, scores.top(3), seed=0).heads) == {(1, 0), (1, 1), (1, 2)}
    assert random_control(scores, scores.top(4), seed=0) is None


def test_layers_and_exclusion_can_be_left_out():
    scores = HeadScores([[9, 8, 7, 6], [2, 3, 0, 1]])
    free = [random_control(scores, scores.top(2), s, keep_layer_histogram=False).heads for s in range(20)]
    assert {heads.by_layer.keys() == {0} for heads in free} == {True, False}
    assert not any(heads & scores.top(2) for heads in free)
    among = [random_control(scores, scores.top(2), s, exclude_ranked=False) for s in range(20)]
    assert any(c.heads & scores.top(2) for c in among)
    assert all(layers(c.heads) == {0: 2} and c.moved == 0 for c in among)
    assert random_control(scores, scores.top(8), 0, exclude_ranked=False).heads == scores.top(8)


def test_heads_that_were_not_measured_are_not_drawn():
    scores = HeadScores([[9.0, 8.0], [0.0, 0.0], [2.0, 3.0]], missing=[1])
    assert random_control(scores, scores.top(2), seed=1).heads == HeadSet(["L2H0", "L2H1"], n_layers=3, n_heads=2)


def test_heads_of_another_model():
    with pytest.raises(HeadError, match=r"model of 1 x 2 \(layers x heads\); .* has 5 x 8"):
        random_control(SCORES, HeadSet([(0, 0)], n_layers=1, n_heads=2), 0)

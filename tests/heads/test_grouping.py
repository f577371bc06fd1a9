"""Scores of query heads and of the key-value heads that they share, against NumPy."""

import numpy as np
import pytest
import torch

from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadScores

VALUES = np.random.default_rng(0).normal(size=(3, 8))


def test_query_heads_take_the_score_of_the_head_they_read():
    kv = HeadScores(VALUES[:, :4], name="gate", counts=[[1, 2, 3, 4]] * 3, provenance={"seed": 1}, missing=[1])
    query = kv.to_query(8)
    expected = np.stack([VALUES[:, h // 2] for h in range(8)], axis=1)
    np.testing.assert_array_equal(query.values[[0, 2]], expected[[0, 2]])
    assert query.missing == (1,) and query.name == "gate"
    assert query.counts.tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]] * 3
    assert query.provenance == {"seed": 1, "heads": "query", "repeated": 2}
    assert kv.to_query(4) == kv


@pytest.mark.parametrize(("reduce", "numpy"), [("sum", np.sum), ("mean", np.mean), ("max", np.max)])
def test_key_value_heads_reduce_their_groups(reduce, numpy):
    kv = HeadScores(VALUES, counts=np.arange(24).reshape(3, 8)).to_kv(2, reduce)
    np.testing.assert_allclose(kv.values, numpy(VALUES.reshape(3, 2, 4), axis=-1), rtol=1e-15)
    assert kv.counts.tolist() == [[0, 4], [8, 12], [16, 20]]  # as many as every head of the group has
    assert kv.provenance == {"heads": "key-value", "reduced": reduce}


def test_repeating_and_taking_the_mean_gives_the_scores_back():
    kv = HeadScores(VALUES[:, :2])
    torch.testing.assert_close(kv.to_query(6).to_kv(2, "mean").values, kv.values)


@pytest.mark.parametrize("n", [0, 3, 4, 12])
def test_groups_must_be_even(n):
    with pytest.raises(HeadError, match="cannot share"):
        HeadScores(VALUES).to_query(n)
    if n != 4:
        with pytest.raises(HeadError, match="cannot share"):
            HeadScores(VALUES).to_kv(n, "sum")


def test_a_reduction_that_is_none():
    with pytest.raises(HeadError, match="'sum', 'mean', 'max'; got 'std'"):
        HeadScores(VALUES).to_kv(4, "std")


def test_chance_is_that_of_the_regrouped_scores():
    even = HeadScores(np.full((2, 8), 0.1), provenance={"chance": [0.1, None], "chance_by_head": [[0.1] * 8, None]})
    assert "chance_by_head" not in even.to_query(16).provenance and even.to_query(16).provenance["chance"] == [
        0.1,
        None,
    ]
    assert even.to_kv(2, "sum").provenance["chance"] == [0.4, None]
    assert even.to_kv(2, "mean").provenance["chance"] == [0.1, None]
    assert "chance" not in even.to_kv(2, "max").provenance  # the maximum of unequal levels is not their mean
    one_level = HeadScores(np.full((1, 8), 0.1), provenance={"chance": [0.1]})
    assert one_level.to_kv(4, "max").provenance["chance"] == [0.1]

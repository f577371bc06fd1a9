"""The row maths by itself, where the view's tests do not reach."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mllm.attention import row_statistics
from hooked_mllm.attention.row_statistics import (
    attention_rows,
    attention_scores,
    coverage_by_rank,
    first_largest,
    first_rank,
    top_mask,
)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_top_mask_is_a_stable_sort(values, data):
    k = data.draw(st.integers(1, len(values)))
    mask = top_mask(torch.tensor([values], dtype=torch.float32), torch.tensor([k]), k)
    expected = np.argsort(-np.array(values), kind="stable")[:k]
    assert mask[0].nonzero().flatten().tolist() == sorted(expected)


def test_top_mask_takes_a_number_of_its_own_for_each_sample():
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0]]).expand(3, -1)
    mask = top_mask(values, torch.tensor([1, 2, 4]), 4)
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]


def test_top_mask_takes_values_within_rounding_of_the_last_as_equal_to_it():
    values = torch.tensor([[0.5, 0.3 - 1e-7, 0.3 + 2e-7, 0.3, 0.1], [-1.0, -2.0, -2.0 + 1e-6, -torch.inf, -2.0]])
    assert top_mask(values, 2, rounding=1e-5).int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert top_mask(values, 3, rounding=1e-5).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]]
    assert top_mask(values, 2).int().tolist() == [[1, 0, 1, 0, 0], [1, 0, 1, 0, 0]]
    assert top_mask(values, 5, rounding=1e-5).all()


def test_first_largest_is_the_first_of_values_that_rounding_alone_separates():
    rng = np.random.default_rng(0)
    for _ in range(50):
        row = rng.integers(0, 4, 30) / 4
        noisy = torch.from_numpy(row * (1 + 1e-7 * rng.uniform(-1, 1, 30)))
        assert int(first_largest(noisy)) == int(row.argmax())
    assert first_largest(torch.zeros(2, 3)).tolist() == [0, 0]


@pytest.mark.parametrize("copy_below", [0, 1 << 22], ids=["by-layer", "together"])
@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.5, 2.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_are_at_least_float32_and_take_a_scale_per_layer(dtype, scale, copy_below, monkeypatch):
    monkeypatch.setattr(row_statistics, "_COPY_BELOW", copy_below)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 6, 5, 16, generator=generator).to(dtype)
    k = torch.randn(2, 3, 2, 7, 16, generator=generator).to(dtype)
    scores = attention_scores(q, list(k), list(scale))
    expected = np.einsum("lbhqd,lbhkd->lbhqk", q.double().numpy(), k.double().repeat_interleave(3, dim=2).numpy())
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(scores, expected * np.reshape(scale, (2, 1, 1, 1, 1)), atol=2e-5)


def test_hidden_keys_have_no_weight_even_if_they_are_nan():
    q, k = torch.ones(1, 1, 1, 2, 4), torch.ones(1, 1, 1, 3, 4)
    k[..., 1, :] = torch.nan
    visible = torch.tensor([[[[[True, False, True], [True, False, False]]]]])
    rows = attention_rows(q, list(k), [1.0], ~visible)
    assert rows[0, 0, 0].tolist() == [[0.5, 0.0, 0.5], [1.0, 0.0, 0.0]]


def test_coverage_counts_a_key_from_the_first_head_that_holds_it():
    top = torch.tensor(
        [[[[1, 0, 0, 1], [0, 1, 0, 0]]], [[[1, 1, 0, 0], [0, 0, 0, 0]]]]
    ).bool()  # [layer batch head key]
    ranks = torch.tensor([[2, 0], [1, 3]])
    best = first_rank(top, ranks, 4)
    assert best.tolist() == [[1, 0, 4, 2]]
    target = torch.tensor([[True, True, True, False]])
    np.testing.assert_allclose(coverage_by_rank(best, target, 4), [[0, 1 / 3, 2 / 3, 2 / 3, 2 / 3]])

"""Query tokens of a batch and their masks, against index lists made here."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.query_selection import QuerySelection, Selections


def test_scattered_queries_are_gathered_in_order():
    layers = random_layers(lengths=(23, 23))
    scattered = torch.zeros(2, 23, dtype=torch.bool)
    scattered[0, [3, 9, 22]] = True
    scattered[1, [11]] = True
    rows = layers.view().rows(scattered).numpy()
    np.testing.assert_allclose(rows[:, 0], layers.attention[:, 0][:, :, [3, 9, 22]], atol=2e-6)
    np.testing.assert_allclose(rows[:, 1, :, 0], layers.attention[:, 1][:, :, 11], atol=2e-6)


def test_views_of_one_forward_pass_share_their_masks():
    layers = random_layers(lengths=(23, 20))
    masks = Selections(layers.masks.__getitem__, (2, 23), torch.device("cpu"))
    for layer in range(3):
        part = slice(layer, layer + 1)
        view = AttentionView([layer], layers.q[part], layers.k[part], layers.mask[part], layers.scale[part], masks, 3)
        np.testing.assert_allclose(view.profile("question")[0], layers.profile("question")[layer], atol=2e-6)
        assert view.question is masks.mask("question")
    shorter = Selections(lambda name: layers.masks[name][:, 1:], (2, 22), torch.device("cpu"))
    with pytest.raises(InputError, match=r"masks are of shape \[2, 22\] on cpu"):
        AttentionView([0], layers.q[:1], layers.k[:1], layers.mask[:1], layers.scale[:1], shorter, 3)


MASKS = {
    "uneven": [[0, 1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 1, 0]],
    "together": [[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]],
    "shifted": [[0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]],
}


@pytest.mark.parametrize("name", MASKS)
def test_a_selection_is_the_positions_of_each_sample_padded_by_its_last(name):
    mask = np.array(MASKS[name], dtype=bool)
    selection = QuerySelection(name, mask, torch.device("cpu"))
    positions = [np.flatnonzero(row) for row in mask]
    longest = max(map(len, positions))
    padded = [[*row, *[row[-1]] * (longest - len(row))] for row in positions]
    assert selection.positions.tolist() == padded == selection.index.tolist()
    assert selection.counts.tolist() == [len(row) for row in positions] and selection.length == longest
    assert (selection.lowest, selection.even) == (min(map(min, padded)), len({len(row) for row in positions}) == 1)
    assert selection.span == ((2, 5) if name == "together" else None)
    weights = [[1 / len(row)] * len(row) + [0] * (longest - len(row)) for row in positions]
    np.testing.assert_allclose(selection.weight, weights)
    assert selection.valid.tolist() == [[w > 0 for w in row] for row in weights]
    values = np.random.default_rng(0).normal(size=(2, longest))
    own = [values[b, : len(row)].mean() for b, row in enumerate(positions)]
    np.testing.assert_allclose(selection.average(values), own)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", MASKS)
def test_rows_of_queries_are_taken_from_a_later_first_position_too(name, first):
    selection = QuerySelection(name, np.array(MASKS[name], dtype=bool), torch.device("cpu"))
    q = torch.randn(2, 3, 8, 4)
    part = slice(1, selection.length)
    taken = selection.take(q[:, :, first:], part, first)
    for b in range(2):
        assert torch.equal(taken[b], q[b][:, selection.positions[b][part]])


def test_queries_before_the_first_kept_position():
    selection = QuerySelection("question", np.array(MASKS["uneven"], dtype=bool), torch.device("cpu"))
    selection.check(1)
    with pytest.raises(InputError, match="'question' query tokens lie before position 2, in a shared prefix"):
        selection.check(2)
    mask = np.array(MASKS["uneven"], dtype=bool)
    unnamed = QuerySelection(torch.from_numpy(mask), mask, torch.device("cpu"))
    with pytest.raises(InputError, match="Some of the given query tokens"):
        unnamed.check(2)


@pytest.fixture
def selections():
    """Two samples of eight positions, the second with two of padding on its left."""
    masks = {
        "padding": torch.tensor([[0] * 8, [1, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool),
        "question": torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1, 1, 0]], dtype=torch.bool),
        "target": torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1, 0, 0]], dtype=torch.bool),
        "nothing": torch.tensor([[1] + [0] * 7, [1] + [0] * 7], dtype=torch.bool),
    }
    return Selections(masks.__getitem__, (2, 8), torch.device("cpu"))


def test_padding_is_never_part_of_a_mask(selections):
    assert selections.lengths == [8, 6] and selections.padded
    assert selections.host("question")[1].nonzero()[0].tolist() == [5, 6]
    assert selections.mask("question") is selections.mask("question")
    with pytest.raises(LayoutError, match="sample 1"):
        selections.host("nothing")


def test_the_span_of_a_name_and_whether_it_is_whole(selections):
    assert selections.span("question") == (slice(4, 7), False)
    assert selections.span("target") == (slice(1, 6), False)
    whole = torch.zeros(2, 8, dtype=torch.bool)
    whole[:, 3:5] = True
    assert selections.span(whole) == (slice(3, 5), True)


def test_chance_is_the_mean_share_of_keys_among_the_positions_so_far(selections):
    positions = [[4, 5], [5, 6]]
    target = [[1, 2], [3, 5]]
    expected = [
        np.mean([sum(j <= i for j in keys) / (i + 1) for i in own]) for own, keys in zip(positions, target, strict=True)
    ]
    chance = selections.causal_chance("question", "target")
    np.testing.assert_allclose(chance, expected)
    assert selections.causal_chance("question", "target") is chance


@pytest.mark.parametrize("padding", [torch.zeros(2, 7, dtype=torch.bool), torch.zeros(2, 8)])
def test_a_padding_mask_of_another_shape_or_dtype(padding):
    with pytest.raises(InputError, match=r"boolean \[2, 8\] \[batch pos\]; got"):
        Selections(lambda name: padding, (2, 8), torch.device("cpu"))

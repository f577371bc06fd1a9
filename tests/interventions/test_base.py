"""Heads and layers as interventions take them: any form in, one form kept, and an error of ours for the rest."""

import numpy as np
import pytest
import torch

from helpers.wrapped import LAYERS, wrapped
from hooked_mllm import ActivationPatch, AttentionKnockout, HeadAblation, HeadPatch, HeadSet
from hooked_mllm.errors import HeadError, HookNameError, HookValueError
from hooked_mllm.interventions.base import heads_of, keep_head_numbers, keep_heads, keep_layers, layers_of

HEADS = 4
MASK = torch.zeros(LAYERS, HEADS, dtype=torch.bool)
MASK[0, 1] = MASK[2, 3] = True
SET = HeadSet.from_mask(MASK)
WAYS = [
    SET,
    "L0H1, L2H3",
    [(0, 1), "L2H3"],
    ["L0H1", np.array([2, 3])],
    MASK,
    MASK.numpy(),
    MASK.tolist(),
    {0: 1, 2: [3]},
]
Z = {layer: torch.zeros(1, 2, HEADS, 8) for layer in (0, 2)}


@pytest.mark.parametrize("heads", WAYS, ids=lambda heads: type(heads).__name__)
def test_every_form_of_heads_is_the_same_intervention(heads):
    assert list(keep_heads(heads)) == [(0, 1), (2, 3)]
    assert heads_of(keep_heads(heads), wrapped("qwen3_vl"), "text") == SET
    for intervention in (
        HeadAblation(heads, mode="zero", phase="both"),
        AttentionKnockout(heads, keys=[0], phase="prefill"),
        HeadPatch(heads, Z),
    ):
        assert intervention.describe()["heads"] == ["L0H1", "L2H3"]
        assert [name.split(".")[1] for name, _ in intervention.edits(wrapped("qwen3_vl"))] == ["0", "2"]


@pytest.mark.parametrize("heads", [(2, 3), "L2H3", ["L2H3"], np.array([2, 3])], ids=str)
def test_a_single_head(heads):
    assert list(keep_heads(heads)) == [(2, 3)]


@pytest.mark.parametrize("heads", [3, [3], True, "best", [(0, 1, 2)], [(0.5, 1)], object()])
def test_what_names_no_heads(heads):
    for make in (
        lambda: HeadAblation(heads, mode="zero", phase="both"),
        lambda: AttentionKnockout(heads, keys=[0], phase="prefill"),
        lambda: HeadPatch(heads, Z),
    ):
        with pytest.raises(HeadError, match="Expected a head"):
            make()


def test_heads_that_a_tower_lacks():
    model = wrapped("qwen3_vl")
    with pytest.raises(HeadError, match=rf"model of 36 x 32 .*; the text tower of this model has {LAYERS} x {HEADS}"):
        heads_of(HeadSet(["L0H0"], n_layers=36, n_heads=32), model, "text")
    with pytest.raises(HeadError, match="the vision tower of this model"):
        heads_of(SET, model, "vision")
    with pytest.raises(HeadError, match=f"Layer {LAYERS} of head"):
        heads_of(((LAYERS, 0),), model, "text")


@pytest.mark.parametrize(
    ("layers", "kept", "numbers"),
    [
        (1, 1, [1]),
        (-1, -1, [2]),
        (np.int64(1), 1, [1]),
        ([2, 0], (2, 0), [0, 2]),
        (range(1, 3), (1, 2), [1, 2]),
        (np.array([1, -1]), (1, -1), [1, 2]),
        (torch.tensor(1), 1, [1]),
        (torch.tensor([0]), (0,), [0]),
        ({0: "a", 1: "b"}, (0, 1), [0, 1]),
    ],
    ids=str,
)
def test_layers_by_number(layers, kept, numbers):
    assert keep_layers(layers) == kept and layers_of(layers, 3, "text") == numbers
    assert layers_of(keep_layers(layers), 3, "text") == numbers


def test_an_iterator_of_layers_is_read_once():
    knockout = AttentionKnockout(layers=iter([0, 2]), keys=[0], phase="prefill")
    for _ in range(2):
        assert [name.split(".")[1] for name, _ in knockout.edits(wrapped("qwen3_vl"))] == ["0", "2"]
    assert knockout.describe()["layers"] == [0, 2]


@pytest.mark.parametrize("layers", ["1", 1.0, True, [None], [1.5], np.array([True])], ids=str)
def test_what_names_no_layers(layers):
    with pytest.raises(HookValueError, match="Expected layers by number"):
        layers_of(layers, 3, "text")
    with pytest.raises(HookValueError, match="Expected layers by number"):
        ActivationPatch("z", Z, layers=layers)


def test_layers_that_a_tower_lacks():
    for layers, message in (([], "The set of layers is empty"), (3, "Layer 3 is out of range"), ([-4], "Layer -4")):
        with pytest.raises(HookNameError, match=message):
            layers_of(layers, 3, "text")


def test_heads_by_number():
    for heads, numbers in ((2, (2,)), ([1, np.int8(3)], (1, 3)), (torch.tensor([0, 2]), (0, 2)), (range(2), (0, 1))):
        assert keep_head_numbers(heads) == numbers
        assert ActivationPatch("z", Z, heads=heads).describe()["heads"] == list(numbers)
    for heads in (1.0, True):
        with pytest.raises(HeadError, match="Expected a head"):
            ActivationPatch("z", Z, heads=heads)
    with pytest.raises(HeadError, match="empty"):
        keep_head_numbers([])

"""Every way to specify heads, against pairs written out here."""

import numpy as np
import pytest
import torch

from hooked_mllm.display.read_heads import read_head, read_heads, whole_number
from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadScores, HeadSet

SHAPE = (5, 4)
MASK = np.zeros(SHAPE, dtype=bool)
MASK[2, 3] = MASK[0, 1] = True
SET = HeadSet([(2, 3), (0, 1)], n_layers=5, n_heads=4)

IN_ORDER = {
    "names": "L2H3, L0H1",
    "list of names": ["L2H3", "L0H1"],
    "pairs": [(2, 3), (0, 1)],
    "tuple of pairs": ((2, 3), (0, 1)),
    "list pairs": [[2, 3], [0, 1]],
    "numpy integers": [(np.int64(2), np.int32(3)), (np.uint8(0), 1)],
    "torch integers": [(torch.tensor(2), 3), (0, torch.tensor(1))],
    "integer array": np.array([[2, 3], [0, 1]]),
    "integer tensor": torch.tensor([[2, 3], [0, 1]]),
    "array of names": np.array(["L2H3", "L0H1"]),
    "list of integer arrays": [np.array([2, 3]), torch.tensor([0, 1])],
    "set of heads": SET,
    "mapping": {2: [3], 0: 1},
    "mixed": ["L2H3", (0, 1), SET],
    "repeated": ["L2H3", (2, 3), "L0H1", (2, 3)],
    "generator": None,
}
BY_LAYER = {
    "mask": MASK,
    "mask tensor": torch.from_numpy(MASK),
    "mask lists": MASK.tolist(),
    "mask tuples": tuple(map(tuple, MASK.tolist())),
    "mask rows": list(torch.from_numpy(MASK)),
    "mask in a list": [MASK],
    "indices of a mask": torch.from_numpy(MASK).nonzero(),
}


@pytest.mark.parametrize("shape", [SHAPE, None], ids=["shape", "no shape"])
@pytest.mark.parametrize("way", [*IN_ORDER, *BY_LAYER])
def test_heads_are_read_in_every_way(way, shape):
    heads = {**IN_ORDER, **BY_LAYER}[way]
    pairs, known = read_heads((pair for pair in [(2, 3), "L0H1"]) if way == "generator" else heads, shape)
    assert pairs == (((2, 3), (0, 1)) if way in IN_ORDER else ((0, 1), (2, 3)))
    assert [type(number) for pair in pairs for number in pair] == [int] * 4
    states_a_shape = way in ("set of heads", "mixed") or (way in BY_LAYER and way != "indices of a mask")
    assert known == (SHAPE if shape or states_a_shape else None)


@pytest.mark.parametrize("one", ["L2H3", (2, 3), np.array([2, 3]), torch.tensor([2, 3]), {2: 3}, {2: {3}}], ids=str)
def test_one_head(one):
    assert read_heads(one, SHAPE).pairs == ((2, 3),)


@pytest.mark.parametrize(
    "empty", ["", [], (), {}, np.array([]), torch.zeros(0, 2, dtype=torch.long), {2: []}], ids=repr
)
def test_no_head(empty):
    assert read_heads(empty, SHAPE).pairs == ()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (None, "got None"),
        (7, "got 7"),
        ([7], "got 7"),
        (True, "got True"),
        ((True, False), r"got \(True, False\)"),
        ([(True, 1)], r"got \(True, 1\)"),
        ((2.0, 3), r"got \(2.0, 3\)"),
        ([(1, 2, 3)], r"got \(1, 2, 3\)"),
        (np.zeros(SHAPE), r"an array of float64 \[5, 4\]"),
        (torch.zeros(SHAPE, dtype=torch.int32), r"an array of int32 \[5, 4\]"),
        (MASK[0], r"an array of bool \[4\]"),
        ([[True, False], [True]], r"got \[\[True, False\], \[True\]\]"),
        ({"2": [3]}, r"got \('2', 3\)"),
        ({2: "3"}, r"got \(2, '3'\)"),
        (HeadScores([[0.1, 0.2]]), r"got HeadScores\("),
        (["x" * 500], r"got 'x{79}\.\.\. \(str\)"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [SHAPE, None], ids=["shape", "no shape"])
def test_something_else_has_one_form_of_error(heads, message, shape):
    with pytest.raises(HeadError, match=rf"Expected a head .*{message}"):
        read_heads(heads, shape)


def test_heads_that_a_model_lacks():
    for head, message in (
        ((5, 0), "Layer 5 of head L5H0 is not there: layers are 0 to 4"),
        ("L0H4", "Head 4 of L0H4 is not there: heads are 0 to 3 in every layer"),
        ((-1, 0), "Layer -1 of head L-1H0 is not there: layers are 0 to 4"),
    ):
        with pytest.raises(HeadError, match=message):
            read_heads(head, SHAPE)
    assert read_heads((5, 9)).pairs == ((5, 9),)
    with pytest.raises(HeadError, match="layers count from 0"):
        read_heads((-1, 0))
    with pytest.raises(HeadError, match="heads count from 0"):
        read_heads((0, -1))


def test_heads_of_another_model():
    for heads in (SET, MASK, [SET, "L0H0"]):
        with pytest.raises(HeadError, match=r"model of 5 x 4 \(layers x heads\); the tower has 6 x 8"):
            read_heads(heads, (6, 8), whose="the tower")
    with pytest.raises(HeadError, match="5 x 4"):
        read_heads([MASK, HeadSet([(0, 0)], n_layers=6, n_heads=8)])


def test_nested_zeros_and_ones_are_not_guessed():
    for heads, shape in (([[0, 1]], None), ([[1, 0], [0, 1]], (2, 2))):
        with pytest.raises(HeadError, match=r"may be pairs \(layer, head\) or a mask of 0 and 1"):
            read_heads(heads, shape)
    assert read_heads([[0, 1]], SHAPE).pairs == read_heads([(0, 1)]).pairs == ((0, 1),)


def test_whole_numbers():
    for number in (3, np.int8(3), np.uint64(3), torch.tensor(3), np.array(3)):
        assert whole_number(number) == 3 and type(whole_number(number)) is int
    for value in (True, np.True_, torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), "3", None, [3]):
        assert whole_number(value) is None


def test_one_head_is_a_name_or_a_pair():
    for head in ("L2H3", (2, 3), [2, 3], np.array([2, 3]), torch.tensor([2, 3]), (np.int64(2), 3)):
        assert read_head(head) == (2, 3)
    for value in ("L2H3, L0H1", None, 2, (2,), (2, 3, 1), {2: 3}, SET, np.array([2.0, 3.0])):
        with pytest.raises(HeadError, match="Expected a head"):
            read_head(value)

"""HeadSet: an ordered set with algebra, text form and clear errors."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadSet

SHAPE = {"n_layers": 5, "n_heads": 4}
pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=12)


@given(pairs, pairs)
def test_algebra_is_that_of_sets_in_the_order_of_the_left_operand(a, b):
    left, right = HeadSet(a, **SHAPE), HeadSet(b, **SHAPE)
    assert list(left) == list(dict.fromkeys(a))
    assert set(left | right) == set(a) | set(b)
    assert list(left & right) == [head for head in dict.fromkeys(a) if head in b]
    assert list(left - right) == [head for head in dict.fromkeys(a) if head not in b]
    assert list(left | right)[: len(left)] == list(left)
    assert left.union(right) == right.union(left)
    assert left.intersection(right) == right.intersection(left)
    assert left.difference(right) & right == HeadSet(**SHAPE)


@pytest.mark.parametrize("other", ["L2H3", (2, 3), [2, 3], [(2, 3)], {2: [3]}, HeadSet([(2, 3)], **SHAPE).to_mask()])
def test_algebra_with_heads_in_every_form(other):
    heads = HeadSet([(0, 1), (2, 3)], **SHAPE)
    assert list(heads | other) == list(heads.union(other)) == [(0, 1), (2, 3)]
    assert list(HeadSet([(0, 1)], **SHAPE) | other) == [(0, 1), (2, 3)]
    assert list(heads - other) == list(heads.difference(other)) == [(0, 1)]
    assert list(heads & other) == list(heads.intersection(other)) == [(2, 3)]
    for wrong in ("L5H0", HeadSet([(2, 3)], n_layers=6, n_heads=4), 3.5):
        with pytest.raises(HeadError):
            heads | wrong


@given(pairs)
def test_text_and_mask_hold_the_same_heads(a):
    heads = HeadSet(a, **SHAPE)
    assert list(HeadSet.parse(str(heads), **SHAPE)) == list(heads)
    assert HeadSet.from_mask(heads.to_mask()) == heads
    assert int(heads.to_mask().sum()) == len(heads)
    assert {(layer, head) for layer, some in heads.by_layer.items() for head in some} == set(a)


def test_parse_reads_what_people_write():
    heads = HeadSet.parse(" L2H3, l0h1;L4H0  L2H3\n", **SHAPE)
    assert list(heads) == [(2, 3), (0, 1), (4, 0)]
    assert str(heads) == "L2H3, L0H1, L4H0"
    assert heads.by_layer == {0: (1,), 2: (3,), 4: (0,)}
    assert len(HeadSet.parse("", **SHAPE)) == 0


def test_membership_order_and_slices():
    heads = HeadSet(["L2H3", (0, 1), torch.tensor([4, 0])], **SHAPE)
    assert (0, 1) in heads and "L4H0" in heads and (1, 1) not in heads
    assert heads[0] == (2, 3) and heads[-1] == (4, 0)
    assert isinstance(heads[:2], HeadSet) and list(heads[:2]) == [(2, 3), (0, 1)]
    assert repr(heads) == "HeadSet(3 of 5 x 4: L2H3, L0H1, L4H0)"
    assert repr(HeadSet(**SHAPE)) == "HeadSet(0 of 5 x 4)"


def test_equality_ignores_the_order_but_not_the_model():
    a, b = HeadSet([(0, 1), (2, 3)], **SHAPE), HeadSet([(2, 3), (0, 1)], **SHAPE)
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a != HeadSet([(0, 1), (2, 3)], n_layers=6, n_heads=4)
    assert a != {(0, 1), (2, 3)}


def test_it_does_not_change_and_can_be_copied():
    heads = HeadSet([(0, 1)], **SHAPE)
    with pytest.raises(AttributeError, match="does not change"):
        heads.n_layers = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="does not change"):
        del heads.n_layers
    for duplicate in (copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        assert duplicate == heads


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(5, 0)], r"Layer 5 of head L5H0 is not there: layers are 0 to 4"),
        ([(0, 4)], r"Head 4 of L0H4 is not there: heads are 0 to 3"),
        ([(-1, 0)], "Layer -1"),
        (["L1"], "written like 'L20H15'"),
        ([(1, 2, 3)], r"Expected a head as \(layer, head\)"),
        ([(1.0, 2)], r"Expected a head as \(layer, head\)"),
        ([7], r"Expected a head as \(layer, head\)"),
        ("L1H1", "HeadSet.parse"),
    ],
    ids=["layer", "head", "negative", "text", "triple", "float", "number", "one-string"],
)
def test_bad_heads_are_rejected(heads, message):
    with pytest.raises(HeadError, match=message):
        HeadSet(heads, **SHAPE)


def test_heads_of_different_models_do_not_mix():
    a, b = HeadSet([(0, 1)], **SHAPE), HeadSet([(0, 1)], n_layers=36, n_heads=32)
    for combine in (HeadSet.union, HeadSet.intersection, HeadSet.difference):
        with pytest.raises(HeadError, match="5 x 4 and 36 x 32"):
            combine(a, b)
    with pytest.raises(HeadError, match="at least one layer"):
        HeadSet(n_layers=0, n_heads=4)

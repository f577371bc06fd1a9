"""How many heads each layer may take, of each kind of budget."""

import pytest

from hooked_mllm import HeadSet
from hooked_mllm.attention.routing import PerLayer, QueryAwareHeads, Total
from hooked_mllm.errors import HeadError, InputError


def test_budgets():
    assert [PerLayer(3).room(layer, {0: 3, 1: 3}, 6) for layer in range(2, 6)] == [3] * 4
    taken = {}
    for layer in range(6):  # 7 heads over 6 layers, all taken: never more than an even share so far
        taken[layer] = Total(7).room(layer, taken, 6)
    assert list(taken.values()) == [1, 1, 2, 1, 1, 1]
    assert Total(6).room(3, {0: 0, 1: 0, 2: 1}, 6) == 3  # what was left before
    assert Total(6).room(3, {0: 1, 4: 5}, 6) == 3  # later layers are those of another prompt
    assert Total(5, like="first").room(0, {}, 6) == 5 and Total(5, like="first").room(2, {0: 3, 1: 2}, 6) == 0
    core = HeadSet([(1, 0), (1, 1), (4, 7)], n_layers=6, n_heads=8)
    rooms, taken = [], {}
    for layer in range(6):
        taken[layer] = Total(3, like=core).room(layer, taken, 6)
        rooms.append(taken[layer])
    assert rooms == [0, 2, 0, 0, 1, 0]
    for wrong in (lambda: PerLayer(-1), lambda: Total(True), lambda: Total(2, like="last")):
        with pytest.raises(InputError):
            wrong()
    with pytest.raises(InputError, match="empty set"):
        Total(2, like=core[:0])
    for budget in (PerLayer(9), Total(49), Total(3, like=HeadSet(["L0H0"], n_layers=2, n_heads=8))):
        with pytest.raises(HeadError):
            QueryAwareHeads(budget).validate(6, 8)

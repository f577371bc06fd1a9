"""Sizes of sinks and windows, flags of heads, and the keys that a query sees, against loops written out here."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.errors import InputError
from hooked_mllm.kernels.streaming_window import check_sink_and_window, head_flags, visible_keys_at


@pytest.mark.parametrize("sizes", [(0, 1), (4, 16), (np.int64(4), np.int32(16)), (2**40, 2**41)])
def test_whole_numbers_become_plain_ones(sizes):
    checked = check_sink_and_window(*sizes)
    assert checked == tuple(int(size) for size in sizes)
    assert [type(size) for size in checked] == [int, int]


@pytest.mark.parametrize(
    "sizes", [(-1, 4), (0, 0), (1.0, 4), (1, 4.5), (True, 4), (1, True), ("1", 4), (None, 4), (torch.tensor(1.0), 4)]
)
def test_other_sizes_are_rejected(sizes):
    with pytest.raises(InputError, match=r"sink >= 0 and local size >= 1; got sink=.*, local size="):
        check_sink_and_window(*sizes, "local size")


@given(st.sets(st.integers(0, 7)))
def test_flags_of_heads(heads):
    assert head_flags(heads, 8).tolist() == [head in heads for head in range(8)]
    assert head_flags(iter(heads), 8).dtype == torch.bool


@given(
    positions=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=2),
    dense=st.lists(st.booleans(), min_size=1, max_size=3),
    sink=st.integers(0, 5),
    window=st.integers(1, 12),
    bounds=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=2, max_size=2),
)
def test_visible_keys_are_those_of_the_formula(positions, dense, sink, window, bounds):
    start, end = torch.tensor(bounds).T
    seen = visible_keys_at(torch.tensor(positions), 10, torch.tensor(dense), sink, window, start, end)
    assert seen.shape == (2, len(dense), 3, 10)
    for batch, head, query, key in np.ndindex(*seen.shape):
        p = positions[batch if len(positions) == 2 else 0][query]  # one row of positions is that of every sequence
        first, last = bounds[batch]
        expected = first <= key < last and key <= p
        expected = expected and (dense[head] or key < first + sink or key > p - window)
        assert bool(seen[batch, head, query, key]) == expected

"""The definition of attention profiles against NumPy."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.profile_case import Case


@settings(max_examples=15, deadline=None)
@given(
    keys=st.integers(1, 12),
    queries=st.integers(1, 4),
    sink=st.integers(0, 5),
    window=st.integers(1, 9),
    dense=st.sets(st.integers(0, 3)),
    padded=st.booleans(),
    uneven=st.booleans(),
)
def test_the_definition_against_numpy(keys, queries, sink, window, dense, padded, uneven):
    padded = padded and keys > 3
    queries = min(queries, keys if not padded else 1)
    streaming = (tuple(dense), sink, window)
    case = Case(2, 4, 2, queries, keys, 4, padded=padded, streaming=streaming, uneven=uneven, seed=keys)
    assert torch.allclose(case.naive(), case.numpy(), atol=1e-12)

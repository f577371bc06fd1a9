"""The groups of heads that share a tile, against the heads of each key-value head, counted here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.kernels.hybrid_attention.plan import plan

CPU = torch.device("cpu")


@given(st.sets(st.integers(0, 11)), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_every_head_is_in_one_group_of_its_key_value_head_and_kind(dense, n_kv):
    size = 12 // n_kv
    layer = plan(tuple(sorted(dense)), 12, n_kv, CPU)
    heads = []
    for index, (kv, count, *members) in enumerate(layer.rows.tolist()):
        assert 1 <= count <= size and members[count:] == [0] * (size - count)
        for head in members[:count]:
            assert head // size == kv
            assert (head in dense) == (index < layer.n_dense)
        heads += members[:count]
    assert sorted(heads) == list(range(12))


@given(st.sets(st.integers(0, 11)), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_long_groups_come_first_and_are_counted(dense, n_kv):
    layer = plan(tuple(sorted(dense)), 12, n_kv, CPU)
    counts = layer.rows[:, 1].tolist()
    of_dense, of_streaming = counts[: layer.n_dense], counts[layer.n_dense :]
    assert layer.n_streaming == len(of_streaming)
    assert of_dense == sorted(of_dense, reverse=True) and of_streaming == sorted(of_streaming, reverse=True)
    assert layer.most == (max(of_dense, default=0), max(of_streaming, default=0))
    assert layer.n_whole == of_streaming.count(12 // n_kv)


@pytest.mark.parametrize(
    ("dense", "rows", "n_dense", "n_whole"),
    [
        ((), [[0, 2, 0, 1], [1, 2, 2, 3]], 0, 2),
        ((3,), [[1, 1, 3, 0], [0, 2, 0, 1], [1, 1, 2, 0]], 1, 1),
        ((0, 1, 2, 3), [[0, 2, 0, 1], [1, 2, 2, 3]], 2, 0),
    ],
)
def test_plans_written_out(dense, rows, n_dense, n_whole):
    layer = plan(dense, 4, 2, CPU)
    assert (layer.rows.tolist(), layer.n_dense, layer.n_whole) == (rows, n_dense, n_whole)
    assert layer.rows.dtype == torch.int32

"""Streaming heads of a layer."""

import pytest

from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.errors import HeadError, InputError


def test_streaming_heads_out_of_range():
    with pytest.raises(HeadError, match=r"Dense heads \[4\] are out of range: heads are 0 to 3"):
        StreamingHeads((4,), 4, 1, 1)
    for sink, window in ((-1, 1), (0, 0)):
        with pytest.raises(InputError, match="sink >= 0 and window >= 1"):
            StreamingHeads((), 4, sink, window)


@pytest.mark.parametrize("dense", [(), (1,), (0, 3), (3, 2, 1, 0)])
def test_flags_are_true_at_the_dense_heads(dense):
    flags = StreamingHeads(dense, 4, 2, 3).flags("cpu")
    assert flags.tolist() == [head in dense for head in range(4)]


def test_streaming_heads_are_a_key_of_tables():
    """Masks of layers with equal heads are made once."""
    assert len({StreamingHeads((1,), 4, 2, 3), StreamingHeads((1,), 4, 2, 3), StreamingHeads((1,), 4, 2, 4)}) == 2

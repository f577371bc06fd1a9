"""Which heads SDPA computes and where; see helpers/own_process.py for why the cases of the kernel run elsewhere."""

import pytest
import torch

from helpers.hybrid_inputs import in_numpy, tensors
from helpers.own_process import run_cases
from hooked_mllm.kernels.hybrid_attention.dispatch import (
    SIDE_STREAMS,
    dense_by_sdpa,
    neighbours,
    sdpa_supports,
    side_streams,
)


def test_dense_heads_by_sdpa_and_the_rest_by_a_kernel():
    assert run_cases("hybrid_attention_dispatch.py") == (5, 0)


@pytest.mark.parametrize(
    ("dense", "size", "runs"),
    [
        ((), 4, []),
        ((0, 1, 2, 3), 4, [[0, 1, 2, 3]]),
        ((0, 1, 2, 3), 2, [[0, 1], [2, 3]]),  # adjacent, but of two key-value heads
        ((0, 2, 3, 7), 4, [[0], [2, 3], [7]]),
        ((1, 2, 3), 1, [[1], [2], [3]]),
    ],
)
def test_adjacent_heads_of_a_key_value_head_are_one_call(dense, size, runs):
    assert neighbours(dense, size) == runs


@pytest.mark.parametrize("dense", [(0,), (1, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_sdpa_writes_the_dense_heads_and_no_others(dense):
    q, k, v = tensors(2, 6, 2, 12, 12, 8, torch.float64)
    out = torch.full_like(q, torch.nan)
    with dense_by_sdpa(q, k, v, out, dense, 0.3):
        pass
    start, end = torch.tensor([0, 0]), torch.tensor([12, 12])
    expected, _ = in_numpy(q, k, v, range(6), 0, 1, 0.3, start, end)  # causal in every head
    others = [head for head in range(6) if head not in dense]
    torch.testing.assert_close(out[:, list(dense)].cpu(), expected[:, list(dense)], atol=1e-12, rtol=0)
    assert out[:, others].isnan().all()


def test_sdpa_needs_numbers_that_are_adjacent_in_memory():
    q, k, v = (x.cpu() for x in tensors(1, 2, 2, 4, 4, 8))
    assert sdpa_supports(q, k, v)
    assert not sdpa_supports(q, k[..., ::2], v)


def test_streams_have_no_effect_off_a_gpu():
    with side_streams(torch.device("cpu"), SIDE_STREAMS + 3) as streams:
        assert len(streams) == SIDE_STREAMS + 3
        for stream in streams:
            with stream:
                assert not torch.cuda.is_initialized() or torch.cuda.current_stream() == torch.cuda.default_stream()

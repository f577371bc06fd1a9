"""The kernel for groups of streaming heads against the definition."""

import pytest
import torch

from helpers.hybrid_inputs import SMALL, bounds, flags, tensors
from helpers.triton_interpreter import DEVICE, GPU
from hooked_mllm.kernels.hybrid_attention import naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.plan import plan
from hooked_mllm.kernels.hybrid_attention.streaming import launch_streaming

#: queries, keys, sink, window, heads, key-value heads: of a group, all stream
STREAMING = {
    "one row": (1, 1, 4, 16, 4, 1),
    "odd, a sink of one block": (63, 63, 16, 16, 4, 1),
    "a sink of two blocks": (65, 65, 32, 7, 4, 2),
    "no sink": (50, 50, 0, 1, 2, 1),
    "window beyond the sequence": (70, 70, 3, 500, 4, 4),
    "sink beyond the window": (77, 77, 40, 8, 8, 1),
    "a chunk against its cache": (33, 100, 16, 20, 8, 2),
    "more queries than keys": (70, 50, 32, 20, 4, 2),
}


@pytest.mark.parametrize("case", STREAMING)
@pytest.mark.parametrize("padded", [False, True])
def test_the_streaming_kernel_against_the_definition(case, padded):
    rows, length, sink, window, heads, kv = STREAMING[case]
    dtype = torch.float16 if GPU else torch.float32  # descriptors of a GPU need more than a few bytes in a row
    q, k, v = tensors(2, heads, kv, rows, length, 64 if GPU else 16, dtype)
    start, end = bounds(length, padded)
    expected, expected_lse = naive_hybrid_attention(q, k, v, flags((), heads), sink, window, 0.3, start, end)
    around = torch.full((2, rows, heads + 2, q.shape[-1]), float("nan"), device=DEVICE, dtype=dtype)
    out = around[:, :, 1:-1].transpose(1, 2)
    lse = torch.full(expected_lse.shape, float("nan"), device=DEVICE)
    rows_of = plan((), heads, kv, q.device).rows
    given = (start, end) if padded else (None, None)
    launch_streaming(q, k, v, out, lse, rows_of, sink, window, 0.3, *given, SMALL)
    assert torch.allclose(out.float(), expected.float(), atol=3e-3 if GPU else 2e-6)
    assert torch.allclose(lse, expected_lse, atol=2e-4 if GPU else 2e-6)
    assert around[:, :, 0].isnan().all() and around[:, :, -1].isnan().all()


def test_some_groups_of_a_layer_by_the_streaming_kernel():
    """What long prompts get on a GPU: dense heads elsewhere, whole groups here, the rest by the kernel for all."""
    q, k, v = tensors(1, 8, 4, 40, 40, 64 if GPU else 16, torch.float16 if GPU else torch.float32)
    groups = plan((2, 6, 7), 8, 4, q.device)
    assert (groups.n_dense, groups.n_whole, groups.n_streaming) == (2, 2, 3)
    out = torch.full((1, 40, 8, q.shape[-1]), float("nan"), device=DEVICE, dtype=q.dtype).transpose(1, 2)
    whole = groups.rows[groups.n_dense : groups.n_dense + groups.n_whole]
    launch_streaming(q, k, v, out, None, whole, 16, 9, 0.3, None, None, SMALL)
    bounds_of = torch.zeros(1, device=DEVICE), torch.full((1,), 40, device=DEVICE)
    expected, _ = naive_hybrid_attention(q, k, v, flags((), 8), 16, 9, 0.3, *bounds_of)
    assert out[:, [2, 3, 6, 7]].isnan().all()  # groups 1 and 3 have dense heads
    assert torch.allclose(out[:, [0, 1, 4, 5]].float(), expected[:, [0, 1, 4, 5]].float(), atol=3e-3 if GPU else 2e-6)

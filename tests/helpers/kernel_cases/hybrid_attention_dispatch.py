"""Dense heads by torch's SDPA and the others by a kernel, against the definition."""

import pytest
import torch

from helpers.hybrid_inputs import SMALL, flags, tensors
from helpers.triton_interpreter import DEVICE, GPU
from hooked_mllm.kernels.hybrid_attention import naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.dispatch import triton_hybrid_attention


@pytest.mark.parametrize("dense", [(), (0, 1, 5), (2, 4, 5, 6, 7), (4, 5, 6, 7), tuple(range(8))])
def test_dense_heads_by_sdpa_and_the_rest_by_a_kernel(dense):
    dtype = torch.float16 if GPU else torch.float32
    q, k, v = tensors(1, 8, 2, 45, 45, 64 if GPU else 16, dtype)
    both = torch.zeros(1, device=DEVICE), torch.full((1,), 45, device=DEVICE)
    expected, expected_lse = naive_hybrid_attention(q, k, v, flags(dense, 8), 4, 9, 0.3, *both)
    z, none = triton_hybrid_attention(q, k, v, dense, 4, 9, 0.3, sdpa=True, config=SMALL)
    assert none is None and z.transpose(1, 2).is_contiguous()
    assert torch.allclose(z.float(), expected.float(), atol=3e-3 if GPU else 2e-6)
    if len(dense) == 3:  # SDPA has no log-sum-exp: a kernel computes it
        _, lse = triton_hybrid_attention(q, k, v, dense, 4, 9, 0.3, with_lse=True, sdpa=True, config=SMALL)
        assert torch.allclose(lse, expected_lse, atol=2e-4 if GPU else 2e-6)

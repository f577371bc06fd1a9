"""The marks of the k largest numbers of a row, by the kernel and by sorting."""

import pytest
import torch

from helpers.triton_interpreter import DEVICE, GPU
from hooked_mllm.attention.row_statistics import top_mask
from hooked_mllm.kernels.attention_profile.largest import triton_top_mask


@pytest.mark.parametrize("n", [1, 63])
def test_the_marks_of_the_largest(n):
    generator = torch.Generator().manual_seed(n)
    ties = torch.randint(-1, 2, (n,), generator=generator) * 0.25
    values = torch.stack([ties, -0.0 * ties, torch.randn(n, generator=generator)])[None, None]
    assert torch.equal(triton_top_mask(values.to(DEVICE), max(1, n // 3)).cpu(), top_mask(values, max(1, n // 3)))
    each = torch.tensor([[1], [n]])
    values = values[:, :, ::2].transpose(1, 2).contiguous()
    assert torch.equal(triton_top_mask(values.to(DEVICE), each).cpu(), top_mask(values, each, n))


@pytest.mark.skipif(not GPU, reason="long rows are slow in the interpreter")
@pytest.mark.parametrize("n", [1000, 8193, 16384, 131072])
def test_the_marks_of_the_largest_of_long_rows(n):
    values = torch.randn(3, 1, 8, n).mul(2).exp().softmax(-1)
    values[..., 5:400] = values[..., 5:6]  # ties
    for k in (1, n // 20, n // 2, n):
        assert torch.equal(top_mask(values.cuda(), k).cpu(), top_mask(values, k))

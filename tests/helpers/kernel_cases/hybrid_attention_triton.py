"""The kernel for all heads against the definition; without a GPU, under Triton's interpreter."""

import pytest
import torch

from helpers.hybrid_inputs import SMALL, bounds, flags, tensors
from helpers.triton_interpreter import DEVICE, DTYPES, GPU
from hooked_mllm.kernels.hybrid_attention import naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.dispatch import triton_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.plan import plan
from hooked_mllm.kernels.hybrid_attention.triton import launch

#: queries, keys, sink, window, dense heads, heads, key-value heads
CASES = {
    "one row": (1, 1, 4, 16, (0,), 4, 1),
    "odd": (63, 63, 4, 16, (0, 3), 4, 2),
    "one more than a tile": (65, 65, 0, 1, (1,), 4, 2),
    "window beyond the sequence": (70, 70, 3, 500, (), 4, 1),
    "sink beyond the window": (77, 77, 40, 8, (2,), 4, 4),
    "sink beyond the sequence": (40, 40, 100, 4, (), 4, 2),
    "all dense": (66, 66, 4, 8, (0, 1, 2, 3, 4, 5), 6, 2),
    "a chunk against its cache": (33, 100, 5, 20, (1, 4), 6, 3),
    "a single query": (1, 77, 4, 9, (3,), 6, 2),
    "more queries than keys": (70, 50, 4, 16, (0,), 4, 2),
    "one key-value head": (50, 50, 4, 16, (1, 2), 4, 1),
    "groups of seven": (45, 45, 4, 16, (2, 9), 14, 2),
    "groups of eight": (45, 45, 4, 16, (2, 9), 16, 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel_against_the_definition(case, padded):
    rows, length, sink, window, dense, heads, kv = CASES[case]
    q, k, v = tensors(2, heads, kv, rows, length, 16)
    start, end = bounds(length, padded)
    expected, expected_lse = naive_hybrid_attention(q, k, v, flags(dense, heads), sink, window, 0.3, start, end)
    given = (start, end) if padded else (None, None)
    z, lse = triton_hybrid_attention(q, k, v, dense, sink, window, 0.3, *given, True, config=SMALL)
    assert torch.allclose(z, expected, atol=2e-6)
    assert torch.allclose(lse, expected_lse, atol=2e-6)


@pytest.mark.parametrize("d", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims_and_dtypes(d, dtype):
    length = 300 if GPU else 24
    q, k, v = tensors(1, 2, 1, length, length, d, dtype)
    both = torch.zeros(1, device=DEVICE), torch.full((1,), length, device=DEVICE)
    expected, _ = naive_hybrid_attention(q.double(), k.double(), v.double(), flags((1,), 2), 5, 20, d**-0.5, *both)
    config = None if GPU else SMALL
    z, _ = triton_hybrid_attention(q, k, v, (1,), 5, 20, d**-0.5, config=config)
    assert z.dtype == dtype
    error = ((z.double() - expected).norm() / expected.norm()).item()
    assert error < {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]


def test_every_place_of_the_result_is_written_and_nothing_else():
    q, k, v = tensors(2, 6, 3, 45, 45, 16)
    around = torch.full((2, 45, 8, 16), float("nan"), device=DEVICE)
    out = around[:, :, 1:7].transpose(1, 2)
    lse = torch.full((2, 6, 45), float("nan"), device=DEVICE)
    launch(q, k, v, out, lse, plan((0, 4), 6, 3, q.device), 4, 8, 0.25, None, None, SMALL)
    assert not out.isnan().any() and not lse.isnan().any()
    assert around[:, :, 0].isnan().all() and around[:, :, 7].isnan().all()


@pytest.mark.parametrize("dense", [(0,), ()])
def test_extreme_scores_and_rows_without_a_visible_key(dense):
    q, k, v = tensors(2, 4, 2, 40, 40, 16)
    q = q * 100 / q.norm(dim=-1, keepdim=True)
    k = k * 100 / k.norm(dim=-1, keepdim=True)  # q . k up to 1e4
    start = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)  # the second sequence is padding
    end = torch.tensor([40, 40], dtype=torch.int32, device=DEVICE)
    expected, expected_lse = naive_hybrid_attention(q, k, v, flags(dense, 4), 4, 8, 1.0, start, end)
    z, lse = triton_hybrid_attention(q, k, v, dense, 4, 8, 1.0, start, end, True, config=SMALL)
    assert torch.allclose(z, expected, atol=2e-3 if GPU else 1e-4) and torch.isfinite(z).all()
    assert (z[1] == 0).all() and (lse[1] == -torch.inf).all()
    assert torch.allclose(lse[0], expected_lse[0], rtol=1e-5)


def test_rows_with_one_visible_key_are_its_value():
    q, k, v = tensors(1, 4, 2, 36, 36, 16)
    z, lse = triton_hybrid_attention(q * 1e3, k, v, (), 0, 1, 1.0, None, None, True, config=SMALL)
    # compiled, a product and a difference are fused: the weight of the one key is 1 but for rounding, and divided out
    assert torch.allclose(z, v.repeat_interleave(2, dim=1), rtol=3e-7 if GPU else 0, atol=0)
    assert torch.allclose(lse, (q * 1e3 * k.repeat_interleave(2, dim=1)).sum(-1), rtol=1e-5, atol=1e-3)


def test_inputs_strided_in_any_way_are_read_in_place():
    q, k, v = tensors(1, 4, 2, 30, 30, 16)
    wide = torch.randn(1, 30, 8, 32, device=DEVICE)  # queries, keys and values as one projection makes them
    wide[:, :, :4, ::2], wide[:, :, 4:6, ::2], wide[:, :, 6:, ::2] = (x.transpose(1, 2) for x in (q, k, v))
    views = [wide[:, :, part, ::2].transpose(1, 2) for part in (slice(4), slice(4, 6), slice(6, 8))]
    shared = k[:, :1].expand(-1, 2, -1, -1)  # a stride of 0
    for there, same in ((views, (q, k, v)), ((q, shared, v), (q, shared.contiguous(), v))):
        z, _ = triton_hybrid_attention(*there, (1,), 4, 8, 0.25, config=SMALL)
        assert torch.equal(z, triton_hybrid_attention(*same, (1,), 4, 8, 0.25, config=SMALL)[0])


def test_the_same_twice():
    q, k, v = tensors(1, 4, 2, 90, 90, 16, torch.float16)
    for dense in ((1,), ()):
        first, again = (triton_hybrid_attention(q, k, v, dense, 4, 16, 0.25, config=SMALL)[0] for _ in range(2))
        assert torch.equal(first, again)

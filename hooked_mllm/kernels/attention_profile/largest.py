"""Marks the k largest of many numbers in Triton: the threshold bit by bit, ties to the lower index."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.kernels.implementations import current_device

#: the longest rows that the kernel supports: a program keeps a row in registers
LONGEST = 16384


@triton.jit
@no_type_check  # the compiler reads the source: shape checks must not wrap the function
def _ordered(pointers, in_range):
    """Float32 as unsigned integers of the same order; the lowest outside the range."""
    value = tl.load(pointers, mask=in_range, other=0.0) + 0.0  # -0 becomes 0: they are equal
    bits = value.to(tl.uint32, bitcast=True)
    # IEEE order: flip all bits of a negative number, the sign bit of others
    negative = (bits >> 31) == 1
    bits = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)  # `~` is -1 in Triton 3.6's interpreter
    return tl.where(in_range, bits, 0)


@triton.jit(do_not_specialize=["k", "n"])
@no_type_check
def mark_largest(values, k_ptr, out, k, n, heads, batch, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """One row: True at its k largest. With EACH, k is that of the row's sample, of `heads` rows each."""
    row = tl.program_id(0)
    if EACH:
        k = tl.load(k_ptr + row // heads % batch)
    index = tl.arange(0, BLOCK)
    bits = _ordered(values + row.to(tl.int64) * n + index, index < n)
    threshold = tl.full([], 0, tl.uint32)  # the k-th largest: the largest value that k numbers reach, two bits a step
    for step in range(16):
        shift = tl.cast(30 - 2 * step, tl.uint32)
        one = threshold | (tl.full([], 1, tl.uint32) << shift)
        two = threshold | (tl.full([], 2, tl.uint32) << shift)
        three = threshold | (tl.full([], 3, tl.uint32) << shift)
        reach_one = tl.sum((bits >= one).to(tl.int32), 0)
        reach_two = tl.sum((bits >= two).to(tl.int32), 0)
        reach_three = tl.sum((bits >= three).to(tl.int32), 0)
        threshold = tl.where(reach_one >= k, one, threshold)
        threshold = tl.where(reach_two >= k, two, threshold)
        threshold = tl.where(reach_three >= k, three, threshold)
    room = k - tl.sum((bits > threshold).to(tl.int32), 0)  # left for numbers equal to the threshold, lower index first
    ties = (bits == threshold) & (index < n)
    marked_ties = ties & (tl.cumsum(ties.to(tl.int32), 0) <= room)
    marks = ((bits > threshold) | marked_ties).to(tl.int8)
    tl.store(out + row.to(tl.int64) * n + index, marks, mask=index < n)


def triton_top_mask(
    values: Float[Tensor, "layer batch head item"], k: Int[Tensor, "batch 1"] | int
) -> Bool[Tensor, "layer batch head item"]:
    """`top_mask` of contiguous float32 values, in one launch."""
    n, each = values.shape[-1], k.to(values.device, torch.int32).contiguous() if isinstance(k, Tensor) else None
    mask = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    block = max(triton.next_power_of_2(n), 16)
    sizes = (1, 1) if each is None else (values.shape[2], values.shape[1])
    kernel: Any = mark_largest
    with current_device(values.device):
        kernel[(values.numel() // n,)](
            values, values if each is None else each, mask.view(torch.int8), k if each is None else 1, n, *sizes,
            BLOCK=block, EACH=each is not None, num_warps=max(1, min(16, block // 512)), enable_fp_fusion=True,
        )  # fmt: skip
    return mask

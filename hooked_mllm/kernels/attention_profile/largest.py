"""Marking the k largest of many numbers in Triton: the threshold bit by bit, ties to the lower index."""

from contextlib import nullcontext
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

#: the longest rows that the kernel takes: a program keeps a row in registers
LONGEST = 16384


@triton.jit
@no_type_check  # the compiler reads the source, which no shape check may wrap
def _ordered(at, there):
    """Float32 as unsigned integers of the same order; what is not there is the lowest."""
    value = tl.load(at, mask=there, other=0.0) + 0.0  # -0 and 0 are equal
    bits = value.to(tl.uint32, bitcast=True)
    negative = (bits >> 31) == 1
    bits = tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)  # `~` is -1 to Triton 3.6's interpreter
    return tl.where(there, bits, 0)


@triton.jit(do_not_specialize=["k", "n"])
@no_type_check
def mark_largest(values, k_ptr, out, k, n, heads, batch, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """One row: True at its k largest. With EACH, k is that of the sample, one in `batch`, `heads` rows each."""
    row = tl.program_id(0)
    if EACH:
        k = tl.load(k_ptr + row // heads % batch)
    place = tl.arange(0, BLOCK)
    held = _ordered(values + row.to(tl.int64) * n + place, place < n)
    threshold = tl.full([], 0, tl.uint32)  # the largest that k numbers reach, two bits at a time
    for step in range(16):
        shift = tl.cast(30 - 2 * step, tl.uint32)
        one = threshold | (tl.full([], 1, tl.uint32) << shift)
        two = threshold | (tl.full([], 2, tl.uint32) << shift)
        three = threshold | (tl.full([], 3, tl.uint32) << shift)
        ones = tl.sum((held >= one).to(tl.int32), 0)
        twos = tl.sum((held >= two).to(tl.int32), 0)
        threes = tl.sum((held >= three).to(tl.int32), 0)
        threshold = tl.where(ones >= k, one, threshold)
        threshold = tl.where(twos >= k, two, threshold)
        threshold = tl.where(threes >= k, three, threshold)
    room = k - tl.sum((held > threshold).to(tl.int32), 0)  # filled from the left by those at the threshold
    level = (held == threshold) & (place < n)
    taken = level & (tl.cumsum(level.to(tl.int32), 0) <= room)
    tl.store(out + row.to(tl.int64) * n + place, ((held > threshold) | taken).to(tl.int8), mask=place < n)


def triton_top_mask(values: Tensor, k: Tensor | int) -> Tensor:
    """`top_mask` of contiguous float32 `[layer batch head item]` in one launch; k a number or `[batch 1]`."""
    n, each = values.shape[-1], k.to(values.device, torch.int32).contiguous() if isinstance(k, Tensor) else None
    out = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    block = max(triton.next_power_of_2(n), 16)
    sizes = (1, 1) if each is None else (values.shape[2], values.shape[1])
    kernel: Any = mark_largest
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        kernel[(values.numel() // n,)](
            values, values if each is None else each, out.view(torch.int8), k if each is None else 1, n, *sizes,
            BLOCK=block, EACH=each is not None, num_warps=max(1, min(16, block // 512)), enable_fp_fusion=True,
        )  # fmt: skip
    return out

"""Marking the k largest of many numbers in Triton: the threshold bit by bit, ties to the lower index."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

#: numbers that one program keeps in registers; longer rows are read anew for each pair of bits
HELD = 8192


@triton.jit
@no_type_check  # the compiler reads the source, which no shape check may wrap
def _ordered(at, there):
    """Float32 as unsigned integers of the same order; what is not there is the lowest."""
    value = tl.load(at, mask=there, other=0.0) + 0.0  # -0 and 0 are equal
    bits = value.to(tl.uint32, bitcast=True)
    negative = (bits >> 31) == 1
    bits = tl.where(negative, ~bits, bits | 0x80000000)
    return tl.where(there, bits, 0)


@triton.jit(do_not_specialize=["k", "n"])
@no_type_check
def mark_largest(values, k_ptr, out, k, n, heads, batch, HELD: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr):
    """One row: True at its k largest. With EACH, k is that of the sample, one in `batch`, `heads` rows each."""
    row = tl.program_id(0)
    values += row.to(tl.int64) * n
    out += row.to(tl.int64) * n
    if EACH:
        k = tl.load(k_ptr + row // heads % batch)
    place = tl.arange(0, BLOCK)
    held = _ordered(values + place, place < n)
    threshold = tl.full([], 0, tl.uint32)  # the largest that k numbers reach, two bits at a time
    for step in range(16):
        shift = tl.cast(30 - 2 * step, tl.uint32)
        one = threshold | (tl.full([], 1, tl.uint32) << shift)
        two = threshold | (tl.full([], 2, tl.uint32) << shift)
        three = threshold | (tl.full([], 3, tl.uint32) << shift)
        if HELD:
            ones = tl.sum((held >= one).to(tl.int32), 0)
            twos = tl.sum((held >= two).to(tl.int32), 0)
            threes = tl.sum((held >= three).to(tl.int32), 0)
        else:
            first, second, third = (held >= one).to(tl.int32), (held >= two).to(tl.int32), (held >= three).to(tl.int32)
            for begin in tl.range(BLOCK, n, BLOCK):
                some = _ordered(values + begin + place, begin + place < n)
                first += (some >= one).to(tl.int32)
                second += (some >= two).to(tl.int32)
                third += (some >= three).to(tl.int32)
            ones, twos, threes = tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)
        threshold = tl.where(ones >= k, one, threshold)
        threshold = tl.where(twos >= k, two, threshold)
        threshold = tl.where(threes >= k, three, threshold)
    count = tl.sum((held > threshold).to(tl.int32), 0)
    if not HELD:
        above = (held > threshold).to(tl.int32)
        for begin in tl.range(BLOCK, n, BLOCK):
            above += (_ordered(values + begin + place, begin + place < n) > threshold).to(tl.int32)
        count = tl.sum(above, 0)
    room = k - count  # filled from the left by those at the threshold
    level = (held == threshold) & (place < n)
    taken = level & (tl.cumsum(level.to(tl.int32), 0) <= room)
    tl.store(out + place, ((held > threshold) | taken).to(tl.int8), mask=place < n)
    if not HELD:
        room -= tl.sum(level.to(tl.int32), 0)
        for begin in tl.range(BLOCK, n, BLOCK):
            at = begin + place
            some = _ordered(values + at, at < n)
            level = (some == threshold) & (at < n)
            taken = level & (tl.cumsum(level.to(tl.int32), 0) <= room)
            room -= tl.sum(level.to(tl.int32), 0)
            tl.store(out + at, ((some > threshold) | taken).to(tl.int8), mask=at < n)


def triton_top_mask(values: Tensor, k: Tensor | int, held: int = HELD) -> Tensor:
    """`top_mask` of contiguous float32 `[layer batch head item]` in one launch; k a number or `[batch 1]`."""
    n = values.shape[-1]
    out = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    each = isinstance(k, Tensor)
    if each:
        k = k.to(values.device, torch.int32).contiguous()
    block = min(max(triton.next_power_of_2(n), 16), held)
    sizes = values.shape[-2:-1] + values.shape[-3:-2] if each else (1, 1)
    kernel: Any = mark_largest
    with torch.cuda.device(values.device) if values.is_cuda else torch.no_grad():
        kernel[(values.numel() // n,)](
            values, k if each else values, out.view(torch.int8), 1 if each else k, n, *sizes,
            HELD=n <= held, BLOCK=block, EACH=each, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return out

"""The Triton kernel for groups of heads that all stream: the same mask as triton.py, with less around it."""

from typing import Any, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from hooked_mllm.kernels.hybrid_attention.triton import (
    describable,
    described,
    hopper,
    key_ranges,
    rows_from,
    seen_keys,
    softmax_step,
)


@triton.jit(
    do_not_specialize=["q_length", "kv_length", "sink", "window", "n_groups"],
    do_not_specialize_on_alignment=["plan_ptr"],
)
@no_type_check  # the compiler reads the source, which no shape check may wrap
def _streaming(
    q_ptr, k_source, v_source, out_box, lse_ptr, plan_ptr, start_ptr, end_ptr, stride_qb, stride_qh, stride_qm,
    n_heads, n_groups, q_length, kv_length, sink, window, scale,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr,
    WITH_LSE: tl.constexpr, EVERY: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows: all heads of one group, head by head, at BLOCK_M / GROUP positions."""
    POSITIONS: tl.constexpr = BLOCK_M // GROUP
    batch, kv = tl.program_id(1), tl.program_id(0) % n_groups
    begin_at = tl.program_id(0) // n_groups * POSITIONS
    if not EVERY:
        kv = tl.load(plan_ptr + kv * (GROUP + 2))
    row, d = tl.arange(0, BLOCK_M), tl.arange(0, D)
    query = begin_at + row % POSITIONS
    q_at = q_ptr + batch.to(tl.int64) * stride_qb + (kv * GROUP + row // POSITIONS).to(tl.int64)[:, None] * stride_qh
    q_at += query.to(tl.int64)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_at, mask=(query < q_length)[:, None], other=0.0)
    if PADDED:
        first, last = tl.load(start_ptr + batch), tl.load(end_ptr + batch)
    else:
        first, last = 0, kv_length
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    log2_scale = scale * 1.4426950408889634
    lowest = begin_at + kv_length - q_length
    highest = tl.minimum(lowest + POSITIONS, kv_length) - 1
    stop, begin, sink_end, low, full_low, full_high = key_ranges(
        lowest, highest, first, last, sink, window, BLOCK_N)  # fmt: skip
    sinks = tl.maximum(tl.cdiv(tl.minimum(sink_end, stop) - begin, BLOCK_N), 0)
    # a sink of whole blocks, behind which every row stands, is seen by all: it goes with the middle of the window
    whole = (first == begin) & (first + sink == sink_end) & (sink_end <= tl.minimum(lowest + 1, last))
    wholes = tl.where(whole, sinks, 0)
    sinks -= wholes
    leads = sinks + tl.maximum(tl.cdiv(tl.minimum(full_low, stop) - low, BLOCK_N), 0)
    edges = leads + tl.maximum(tl.cdiv(stop - full_high, BLOCK_N), 0)
    for i in tl.range(0, edges):
        n = tl.where(i < leads, low + (i - sinks) * BLOCK_N, full_high + (i - leads) * BLOCK_N)
        n = tl.where(i < sinks, begin + i * BLOCK_N, n)
        k = rows_from(k_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, True, True)
        s = tl.dot(q, k.T)
        place = tl.arange(0, BLOCK_M) % POSITIONS + lowest
        s = tl.where(seen_keys(place, n, first, last, sink, window, BLOCK_N, PADDED), s, float("-inf"))
        v = rows_from(v_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, True, True)
        acc, total, best = softmax_step(acc, total, best, s, v, log2_scale, True, "tf32", SETTLE)
    for i in tl.range(0, wholes + (full_high - full_low) // BLOCK_N):
        n = tl.where(i < wholes, begin + i * BLOCK_N, full_low + (i - wholes) * BLOCK_N)
        k = rows_from(k_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, False, True)
        s = tl.dot(q, k.T)
        v = rows_from(v_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, False, True)
        acc, total, best = softmax_step(acc, total, best, s, v, log2_scale, False, "tf32", SETTLE)
    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    out_box.store([batch, kv * GROUP, begin_at, 0], acc.to(out_box.dtype).reshape(1, GROUP, POSITIONS, D))
    if WITH_LSE:
        lse = tl.where(blind, float("-inf"), (best + tl.log2(tl.where(blind, 1.0, total))) * 0.6931471805599453)
        row = tl.arange(0, BLOCK_M)
        query = begin_at + row % POSITIONS
        head = kv * GROUP + row // POSITIONS
        tl.store(lse_ptr + (batch.to(tl.int64) * n_heads + head) * q_length + query, lse, mask=query < q_length)


def fits(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> bool:
    """Whether this kernel takes such tensors: head dim 64 or 128, groups of a power of two, a Hopper GPU."""
    group = q.shape[1] // k.shape[1]
    return (
        q.shape[3] in (64, 128)
        and group in (1, 2, 4, 8, 16, 32)
        and q.stride(3) == 1
        and all(describable(x) for x in (k, v, out))
        and hopper(q)
    )


def launch_streaming(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    rows: Tensor,
    sink: int,
    window: int,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    config: dict[str, Any] | None = None,
) -> None:
    """Run the kernel over whole groups of heads, the rows of a plan."""
    batch, n_heads, q_length, d_head = q.shape
    n_kv, kv_length = k.shape[1], k.shape[2]
    settings = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128, **(config or {})}
    group, padded = n_heads // n_kv, start is not None
    positions, box = settings["BLOCK_M"] // group, [1, 1, settings["BLOCK_N"], d_head]
    kernel: Any = _streaming
    kernel[(len(rows) * -(-q_length // positions), batch)](
        q, described(k, box), described(v, box), described(out, [1, group, positions, d_head]),
        rows if lse is None else lse, rows, start if padded else rows, end if padded else rows, *q.stride()[:3],
        n_heads, len(rows), q_length, kv_length, sink, window, scale, D=d_head, GROUP=group, PADDED=padded,
        WITH_LSE=lse is not None, EVERY=len(rows) == n_kv, SETTLE=hopper(q), enable_fp_fusion=True, **settings,
    )  # fmt: skip

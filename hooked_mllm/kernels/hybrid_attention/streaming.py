"""The Triton kernel for groups whose heads all stream: the mask of triton.py, without its table and divisions."""

from typing import Any, no_type_check

import triton
import triton.language as tl
from torch import Tensor

from hooked_mllm.kernels.hybrid_attention.triton import (
    describable,
    descriptor,
    hopper,
    key_ranges,
    load_block,
    softmax_step,
    visible,
)
from hooked_mllm.kernels.implementations import Keys, Queries


@triton.jit(
    do_not_specialize=["q_length", "kv_length", "sink", "window", "n_groups"],
    do_not_specialize_on_alignment=["plan_ptr"],
)
@no_type_check  # the compiler reads the source: shape checks must not wrap the function
def _streaming(
    q_ptr, k_source, v_source, z_box, lse_ptr, plan_ptr, start_ptr, end_ptr, stride_qb, stride_qh, stride_qm,
    n_heads, n_groups, q_length, kv_length, sink, window, scale,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr,
    WITH_LSE: tl.constexpr, EVERY: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows: all heads of one group, head by head, at BLOCK_M / GROUP queries."""
    POSITIONS: tl.constexpr = BLOCK_M // GROUP
    # grid: [(tile group) batch]
    batch, kv = tl.program_id(1), tl.program_id(0) % n_groups
    first_query = tl.program_id(0) // n_groups * POSITIONS
    if not EVERY:
        kv = tl.load(plan_ptr + kv * (GROUP + 2))
    row, d = tl.arange(0, BLOCK_M), tl.arange(0, D)  # rows are [(head query)]
    query = first_query + row % POSITIONS
    head = (kv * GROUP + row // POSITIONS).to(tl.int64)
    q_pointers = q_ptr + batch.to(tl.int64) * stride_qb + head[:, None] * stride_qh
    q_pointers += query.to(tl.int64)[:, None] * stride_qm + d[None, :]
    q = tl.load(q_pointers, mask=(query < q_length)[:, None], other=0.0)
    if PADDED:
        first, last = tl.load(start_ptr + batch), tl.load(end_ptr + batch)
    else:
        first, last = 0, kv_length
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    log2_scale = scale * 1.4426950408889634  # log2(e)
    lowest = first_query + kv_length - q_length
    highest = tl.minimum(lowest + POSITIONS, kv_length) - 1
    stop, begin, sink_end, low, full_low, full_high = key_ranges(
        lowest, highest, first, last, sink, window, BLOCK_N)  # fmt: skip
    sink_blocks = tl.maximum(tl.cdiv(tl.minimum(sink_end, stop) - begin, BLOCK_N), 0)
    # a sink of whole blocks before the first row is seen by every row: it needs no mask, like the middle of the window
    whole = (first == begin) & (first + sink == sink_end) & (sink_end <= tl.minimum(lowest + 1, last))
    whole_blocks = tl.where(whole, sink_blocks, 0)
    sink_blocks -= whole_blocks
    lead_blocks = sink_blocks + tl.maximum(tl.cdiv(tl.minimum(full_low, stop) - low, BLOCK_N), 0)
    edge_blocks = lead_blocks + tl.maximum(tl.cdiv(stop - full_high, BLOCK_N), 0)
    for i in tl.range(0, edge_blocks):  # masked
        n = tl.where(i < lead_blocks, low + (i - sink_blocks) * BLOCK_N, full_high + (i - lead_blocks) * BLOCK_N)
        n = tl.where(i < sink_blocks, begin + i * BLOCK_N, n)
        k = load_block(k_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, True, True)
        s = tl.dot(q, k.T)
        position = tl.arange(0, BLOCK_M) % POSITIONS + lowest  # computed here: kept over the loop, it needs registers
        s = tl.where(visible(position, n, first, last, sink, window, BLOCK_N, PADDED), s, float("-inf"))
        v = load_block(v_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, True, True)
        acc, row_sum, row_max = softmax_step(acc, row_sum, row_max, s, v, log2_scale, True, "tf32", WAIT)
    for i in tl.range(0, whole_blocks + (full_high - full_low) // BLOCK_N):  # every row sees every key
        n = tl.where(i < whole_blocks, begin + i * BLOCK_N, full_low + (i - whole_blocks) * BLOCK_N)
        k = load_block(k_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, False, True)
        s = tl.dot(q, k.T)
        v = load_block(v_source, batch, kv, n, last, 0, 0, D, BLOCK_N, D, False, True)
        acc, row_sum, row_max = softmax_step(acc, row_sum, row_max, s, v, log2_scale, False, "tf32", WAIT)
    empty = row_sum == 0.0  # no visible key: z = 0 and log-sum-exp = -inf
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    # [(head query) d_head] -> [1 head query d_head]
    z_box.store([batch, kv * GROUP, first_query, 0], acc.to(z_box.dtype).reshape(1, GROUP, POSITIONS, D))
    if WITH_LSE:
        log2_sum = tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
        row = tl.arange(0, BLOCK_M)
        query = first_query + row % POSITIONS
        head = kv * GROUP + row // POSITIONS
        offsets = (batch.to(tl.int64) * n_heads + head) * q_length + query
        tl.store(lse_ptr + offsets, log2_sum * 0.6931471805599453, mask=query < q_length)  # ln 2


def fits(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> bool:
    """Whether this kernel supports the tensors: head dim 64 or 128, groups of a power of two, a Hopper GPU."""
    group = q.shape[1] // k.shape[1]
    sizes_fit = q.shape[3] in (64, 128) and group in (1, 2, 4, 8, 16, 32)
    return sizes_fit and q.stride(3) == 1 and all(describable(x) for x in (k, v, out)) and hopper(q)


def launch_streaming(
    q: Queries, k: Keys, v: Keys, out: Queries, lse: Tensor | None, rows: Tensor, sink: int, window: int, scale: float,
    start: Tensor | None, end: Tensor | None, config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Launch the kernel for whole groups of heads, which `rows` of a plan contain; other arguments as of `launch`."""
    batch, n_heads, q_length, d_head = q.shape
    n_kv, kv_length = k.shape[1], k.shape[2]
    settings = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128, **(config or {})}
    group, padded = n_heads // n_kv, start is not None
    positions, box = settings["BLOCK_M"] // group, [1, 1, settings["BLOCK_N"], d_head]
    kernel: Any = _streaming
    kernel[(len(rows) * -(-q_length // positions), batch)](
        q, descriptor(k, box), descriptor(v, box), descriptor(out, [1, group, positions, d_head]),
        rows if lse is None else lse, rows, start if padded else rows, end if padded else rows, *q.stride()[:3],
        n_heads, len(rows), q_length, kv_length, sink, window, scale, D=d_head, GROUP=group, PADDED=padded,
        WITH_LSE=lse is not None, EVERY=len(rows) == n_kv, WAIT=hopper(q), enable_fp_fusion=True, **settings,
    )  # fmt: skip

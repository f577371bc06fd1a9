"""The Triton kernel: dense and streaming heads in one launch, heads of a key-value group packed in one tile.

A row is one query of one head. Scores and maxima are in base 2: the scale contains log2(e).
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hooked_mllm.kernels.hybrid_attention.plan import Plan
from hooked_mllm.kernels.implementations import Keys, Queries


@triton.jit
@no_type_check  # the compiler reads the source: shape checks must not wrap the function
def load_block(
    source, batch, kv, n, last, stride_n, stride_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys or values from n on, `[key d_head]`, by a tensor descriptor or from a pointer to the head's."""
    key, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if TMA:
        block = source.load([batch, kv, n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        pointers = source + n.to(tl.int64) * stride_n + key[:, None] * stride_n + d[None, :] * stride_d
        if BLOCK_D != D:
            block = tl.load(pointers, mask=(key < last - n)[:, None] & (d < D)[None, :], other=0.0)
        elif MASKED:  # a mask over keys only: each key is still read in whole vectors
            block = tl.load(pointers, mask=(key < last - n)[:, None], other=0.0)
        else:
            block = tl.load(pointers)
    return block


@triton.jit
@no_type_check
def visible(position, n, first, last, sink, window, BLOCK_N: tl.constexpr, PADDED: tl.constexpr):
    """The keys that each row sees among BLOCK_N from n on, `[row key]`."""
    key = n + tl.arange(0, BLOCK_N)
    seen = (key[None, :] > position[:, None] - window) | (key < first + sink)[None, :]
    seen &= key[None, :] <= position[:, None]
    if PADDED:
        seen &= ((key >= first) & (key < last))[None, :]
    return seen


@triton.jit
@no_type_check
def softmax_step(
    acc, row_sum, row_max, s, v, scale, MAY_BE_EMPTY: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr
):  # fmt: skip
    """One step of the online softmax over scores s `[row key]`; MAY_BE_EMPTY: a row may have seen no key so far."""
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
    if MAY_BE_EMPTY:  # -inf - -inf would be NaN
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        base = new_max
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(row_max - base)  # rescales what was summed relative to the old maximum
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if WAIT:
        # an empty instruction that makes the compiler wait for the product here. Still in flight in the next iteration,
        # the product would need registers at the same time as the next scores; there are too few, and the assembler
        # would then wait after every matrix instruction.
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc, row_sum, new_max


@triton.jit
@no_type_check
def key_ranges(lowest, highest, first, last, sink, window, BLOCK_N: tl.constexpr):
    """The ranges of keys that rows at positions `lowest` to `highest` see; all but `stop` are multiples of a block.

    In order: the end and the start of all keys, the end of the sink, the start of the window, and the start and the end
    of the range in which every row sees every key.
    """
    stop = tl.minimum(highest + 1, last)
    begin = first // BLOCK_N * BLOCK_N
    sink_end = tl.where(sink > 0, tl.cdiv(first + sink, BLOCK_N) * BLOCK_N, begin)
    low = tl.maximum(tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N, sink_end)
    full_low = tl.cdiv(tl.maximum(tl.maximum(highest - window + 1, first), 0), BLOCK_N) * BLOCK_N
    full_low = tl.maximum(full_low, low)
    full_high = tl.maximum(tl.minimum(lowest + 1, last) // BLOCK_N * BLOCK_N, full_low)
    return stop, begin, sink_end, low, full_low, full_high


@triton.jit(
    do_not_specialize=["q_length", "kv_length", "sink", "window", "n_dense", "n_streaming", "dense_tiles"],
    do_not_specialize_on_alignment=["plan_ptr"],
)
@no_type_check
def _hybrid(
    q_ptr, k_source, v_source, z_ptr, lse_ptr, plan_ptr, start_ptr, end_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    n_heads, q_length, kv_length, n_dense, n_streaming, dense_tiles, sink, window, scale,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows: the queries of one group's heads, query by query."""
    # grid: [tiles of dense groups, then of streaming ones; batch]
    pid, batch = tl.program_id(0), tl.program_id(1)
    dense_programs = n_dense * dense_tiles
    is_dense = pid < dense_programs
    if is_dense:  # a window of all keys; the longest tiles come first
        window = kv_length + q_length
        sink = 0
        entry = pid % tl.maximum(n_dense, 1)
        tile = dense_tiles - 1 - pid // tl.maximum(n_dense, 1)
    else:
        entry = n_dense + (pid - dense_programs) % tl.maximum(n_streaming, 1)
        tile = (pid - dense_programs) // tl.maximum(n_streaming, 1)
    # a row of the plan: key-value head, number of heads, the heads
    kv, count = tl.load(plan_ptr + entry * (GROUP + 2)), tl.load(plan_ptr + entry * (GROUP + 2) + 1)
    if tile * BLOCK_M < count * q_length:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # [(query head)] of the group
        query = row // count
        head = tl.load(plan_ptr + entry * (GROUP + 2) + 2 + row % count)
        valid = query < q_length
        shift = kv_length - q_length  # the last query is at the last key
        position = tl.where(valid, query + shift, shift - 1)
        if PADDED:
            first, last = tl.load(start_ptr + batch), tl.load(end_ptr + batch)
        else:
            first, last = 0, kv_length
        # positions of the first and the last row of the tile
        lowest = (tile * BLOCK_M) // count + shift
        highest = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // count, q_length - 1) + shift
        d = tl.arange(0, BLOCK_D)
        # [row d_head]
        q_pointers = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64)[:, None] * stride_qh
        q_pointers += query.to(tl.int64)[:, None] * stride_qm + d[None, :] * stride_qd
        if BLOCK_D != D:
            q = tl.load(q_pointers, mask=valid[:, None] & (d < D)[None, :], other=0.0)
        else:
            q = tl.load(q_pointers, mask=valid[:, None], other=0.0)
        k_from, v_from = k_source, v_source
        if not TMA:
            k_from += batch.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh
            v_from += batch.to(tl.int64) * stride_vb + kv.to(tl.int64) * stride_vh
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        log2_scale = scale * 1.4426950408889634  # log2(e)
        stop, begin, sink_end, low, full_low, full_high = key_ranges(
            lowest, highest, first, last, sink, window, BLOCK_N)  # fmt: skip
        sink_blocks = tl.maximum(tl.cdiv(tl.minimum(sink_end, stop) - begin, BLOCK_N), 0)
        lead_blocks = sink_blocks + tl.maximum(tl.cdiv(tl.minimum(full_low, stop) - low, BLOCK_N), 0)
        edge_blocks = lead_blocks + tl.maximum(tl.cdiv(stop - full_high, BLOCK_N), 0)
        for i in tl.range(0, edge_blocks):  # the sink, the start of the window, the diagonal: masked
            n = tl.where(i < lead_blocks, low + (i - sink_blocks) * BLOCK_N, full_high + (i - lead_blocks) * BLOCK_N)
            n = tl.where(i < sink_blocks, begin + i * BLOCK_N, n)
            k = load_block(k_from, batch, kv, n, last, stride_kn, stride_kd, D, BLOCK_N, BLOCK_D, True, TMA)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            s = tl.where(visible(position, n, first, last, sink, window, BLOCK_N, PADDED), s, float("-inf"))
            v = load_block(v_from, batch, kv, n, last, stride_vn, stride_vd, D, BLOCK_N, BLOCK_D, True, TMA)
            acc, row_sum, row_max = softmax_step(acc, row_sum, row_max, s, v, log2_scale, True, PRECISION, WAIT)
        for i in tl.range(0, (full_high - full_low) // BLOCK_N):  # every row sees every key
            n = full_low + i * BLOCK_N
            k = load_block(k_from, batch, kv, n, last, stride_kn, stride_kd, D, BLOCK_N, BLOCK_D, False, TMA)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            v = load_block(v_from, batch, kv, n, last, stride_vn, stride_vd, D, BLOCK_N, BLOCK_D, False, TMA)
            acc, row_sum, row_max = softmax_step(acc, row_sum, row_max, s, v, log2_scale, False, PRECISION, WAIT)
        # query and head of each row are computed again: kept over the loops, they would need registers
        count = tl.load(plan_ptr + entry * (GROUP + 2) + 1, volatile=True)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query = row // count
        head = tl.load(plan_ptr + entry * (GROUP + 2) + 2 + row % count)
        valid = query < q_length
        empty = row_sum == 0.0  # no visible key: z = 0 and log-sum-exp = -inf
        acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
        z_pointers = z_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64)[:, None] * stride_oh
        z_pointers += query.to(tl.int64)[:, None] * stride_om + d[None, :] * stride_od
        if BLOCK_D != D:
            tl.store(z_pointers, acc.to(z_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
        else:
            tl.store(z_pointers, acc.to(z_ptr.dtype.element_ty), mask=valid[:, None])
        if WITH_LSE:
            log2_sum = tl.where(empty, float("-inf"), row_max + tl.log2(tl.where(empty, 1.0, row_sum)))
            lse = log2_sum * 0.6931471805599453  # ln 2
            tl.store(lse_ptr + (batch.to(tl.int64) * n_heads + head) * q_length + query, lse, mask=valid)


def launch(
    q: Queries, k: Keys, v: Keys, out: Queries, lse: Tensor | None, groups: Plan, sink: int, window: int, scale: float,
    start: Tensor | None, end: Tensor | None, config: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Launch the kernel for groups of heads, and write `out` and, unless it is None, `lse` `[batch head query]`.

    `start` and `end` are None without padding; `config` replaces tile sizes of `settings_for`.
    """
    batch, n_heads, q_length, d_head = q.shape
    n_kv, kv_length = k.shape[1], k.shape[2]
    settings = {**settings_for(d_head, q.dtype), **(config or {})}
    # of a dense and of a streaming group; smaller groups leave their last tiles empty
    tiles = [-(-heads * q_length // settings["BLOCK_M"]) for heads in groups.most]
    grid = (groups.n_dense * tiles[0] + groups.n_streaming * tiles[1], batch)
    padded, rows, block_d = start is not None, groups.rows, max(16, triton.next_power_of_2(d_head))
    tma = hopper(q) and d_head in (64, 128, 256) and describable(k) and describable(v)
    box = [1, 1, settings["BLOCK_N"], d_head]
    kernel: Any = _hybrid
    kernel[grid](
        q, descriptor(k, box) if tma else k, descriptor(v, box) if tma else v, out, out if lse is None else lse, rows,
        start if padded else rows, end if padded else rows,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        n_heads, q_length, kv_length, groups.n_dense, groups.n_streaming, tiles[0], sink, window, scale,
        D=d_head, GROUP=n_heads // n_kv, BLOCK_D=block_d, PADDED=padded, WITH_LSE=lse is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", TMA=tma,
        WAIT=hopper(q) and bool(settings.get("maxnreg")), enable_fp_fusion=True, **settings,
    )  # fmt: skip


def settings_for(d_head: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes, warps, stages and registers, measured on an H200: two programs fit one multiprocessor."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if d_head > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128}


def hopper(x: Tensor) -> bool:
    """Whether x is on a GPU of compute capability 9, whose matrix instructions and copies are asynchronous."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9


def describable(x: Tensor) -> bool:
    """Whether x can have a tensor descriptor: 16-byte strides, the last stride 1, two bytes a number."""
    strides = [s * x.element_size() for s in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in strides)
    return x.element_size() == 2 and x.stride(-1) == 1 and aligned


def descriptor(x: Tensor, box: list[int]) -> TensorDescriptor:
    """A descriptor of x, which is read or written in boxes of this shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)

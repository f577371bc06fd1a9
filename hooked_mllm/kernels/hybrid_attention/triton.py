"""The Triton kernel: dense and streaming heads in one launch, heads of a key-value group packed in one tile."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hooked_mllm.kernels.hybrid_attention.plan import Plan


@triton.jit
@no_type_check  # the compiler reads the source, which no shape check may wrap
def rows_from(
    source, batch, kv, n, last, stride_n, stride_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys or values from n on: by a tensor descriptor, or from a pointer to those of the head."""
    key, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if TMA:
        found = source.load([batch, kv, n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        at = source + n.to(tl.int64) * stride_n + key[:, None] * stride_n + d[None, :] * stride_d
        if BLOCK_D != D:
            found = tl.load(at, mask=(key < last - n)[:, None] & (d < D)[None, :], other=0.0)
        elif MASKED:  # a mask over keys alone: rows are still read in whole vectors
            found = tl.load(at, mask=(key < last - n)[:, None], other=0.0)
        else:
            found = tl.load(at)
    return found


@triton.jit
@no_type_check
def seen_keys(place, n, first, last, sink, window, BLOCK_N: tl.constexpr, PADDED: tl.constexpr):
    """Which of BLOCK_N keys from n on each row, standing at `place`, sees."""
    key = n + tl.arange(0, BLOCK_N)
    seen = (key[None, :] > place[:, None] - window) | (key < first + sink)[None, :]
    seen &= key[None, :] <= place[:, None]
    if PADDED:
        seen &= ((key >= first) & (key < last))[None, :]
    return seen


@triton.jit
@no_type_check
def softmax_step(
    acc, total, best, s, v, scale, BLIND: tl.constexpr, PRECISION: tl.constexpr, SETTLE: tl.constexpr
):  # fmt: skip
    """One step of the online softmax over scores s; BLIND: rows may have seen nothing so far."""
    new = tl.maximum(best, tl.max(s, 1) * scale)
    if BLIND:
        base = tl.where(new == float("-inf"), 0.0, new)
    else:
        base = new
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    if SETTLE:
        # nothing, but the product must be there. Left in flight into the next round, it needs registers beside those of
        # the next scores, more than there are, and the assembler then waits for every single matrix instruction.
        acc = tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    return acc, total, new


@triton.jit
@no_type_check
def key_ranges(lowest, highest, first, last, sink, window, BLOCK_N: tl.constexpr):
    """What rows at places lowest to highest see.

    Where keys stop and begin, the sink ends and the window begins, and the range in which every row sees every key; all
    but the first in whole blocks.
    """
    stop = tl.minimum(highest + 1, last)  # no row sees keys behind it
    begin = first // BLOCK_N * BLOCK_N
    sink_end = tl.where(sink > 0, tl.cdiv(first + sink, BLOCK_N) * BLOCK_N, begin)
    low = tl.maximum(tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N, sink_end)
    full_low = tl.cdiv(tl.maximum(tl.maximum(highest - window + 1, first), 0), BLOCK_N) * BLOCK_N
    full_low = tl.maximum(full_low, low)
    full_high = tl.maximum(tl.minimum(lowest + 1, last) // BLOCK_N * BLOCK_N, full_low)
    return stop, begin, sink_end, low, full_low, full_high


@triton.jit(
    do_not_specialize=[
        "q_length",
        "kv_length",
        "sink",
        "window",
        "n_dense",
        "n_streaming",
        "dense_tiles",
    ],
    do_not_specialize_on_alignment=["plan_ptr"],
)
@no_type_check
def _hybrid(
    q_ptr, k_source, v_source, out_ptr, lse_ptr, plan_ptr, start_ptr, end_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    n_heads, q_length, kv_length, n_dense, n_streaming, dense_tiles, sink, window, scale,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, SETTLE: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows: positions of the heads of one group, position by position."""
    pid, batch = tl.program_id(0), tl.program_id(1)
    dense_programs = n_dense * dense_tiles
    is_dense = pid < dense_programs
    if is_dense:  # a window that holds everything; the longest work comes first
        window = kv_length + q_length
        sink = 0
        entry = pid % tl.maximum(n_dense, 1)
        tile = dense_tiles - 1 - pid // tl.maximum(n_dense, 1)
    else:
        entry = n_dense + (pid - dense_programs) % tl.maximum(n_streaming, 1)
        tile = (pid - dense_programs) // tl.maximum(n_streaming, 1)
    kv, count = tl.load(plan_ptr + entry * (GROUP + 2)), tl.load(plan_ptr + entry * (GROUP + 2) + 1)
    if tile * BLOCK_M < count * q_length:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query = row // count
        head = tl.load(plan_ptr + entry * (GROUP + 2) + 2 + row % count)
        valid = query < q_length
        shift = kv_length - q_length
        place = tl.where(valid, query + shift, shift - 1)
        if PADDED:
            first, last = tl.load(start_ptr + batch), tl.load(end_ptr + batch)
        else:
            first, last = 0, kv_length
        lowest = (tile * BLOCK_M) // count + shift
        highest = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // count, q_length - 1) + shift
        d = tl.arange(0, BLOCK_D)
        q_at = q_ptr + batch.to(tl.int64) * stride_qb + head.to(tl.int64)[:, None] * stride_qh
        q_at += query.to(tl.int64)[:, None] * stride_qm + d[None, :] * stride_qd
        if BLOCK_D != D:
            q = tl.load(q_at, mask=valid[:, None] & (d < D)[None, :], other=0.0)
        else:
            q = tl.load(q_at, mask=valid[:, None], other=0.0)
        k_from, v_from = k_source, v_source
        if not TMA:
            k_from += batch.to(tl.int64) * stride_kb + kv.to(tl.int64) * stride_kh
            v_from += batch.to(tl.int64) * stride_vb + kv.to(tl.int64) * stride_vh
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        log2_scale = scale * 1.4426950408889634
        stop, begin, sink_end, low, full_low, full_high = key_ranges(
            lowest, highest, first, last, sink, window, BLOCK_N)  # fmt: skip
        sinks = tl.maximum(tl.cdiv(tl.minimum(sink_end, stop) - begin, BLOCK_N), 0)
        leads = sinks + tl.maximum(tl.cdiv(tl.minimum(full_low, stop) - low, BLOCK_N), 0)
        edges = leads + tl.maximum(tl.cdiv(stop - full_high, BLOCK_N), 0)
        for i in tl.range(0, edges):  # the sink, the beginning of the window, the diagonal
            n = tl.where(i < leads, low + (i - sinks) * BLOCK_N, full_high + (i - leads) * BLOCK_N)
            n = tl.where(i < sinks, begin + i * BLOCK_N, n)
            k = rows_from(k_from, batch, kv, n, last, stride_kn, stride_kd, D, BLOCK_N, BLOCK_D, True, TMA)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            s = tl.where(seen_keys(place, n, first, last, sink, window, BLOCK_N, PADDED), s, float("-inf"))
            v = rows_from(v_from, batch, kv, n, last, stride_vn, stride_vd, D, BLOCK_N, BLOCK_D, True, TMA)
            acc, total, best = softmax_step(acc, total, best, s, v, log2_scale, True, PRECISION, SETTLE)
        for i in tl.range(0, (full_high - full_low) // BLOCK_N):
            n = full_low + i * BLOCK_N
            k = rows_from(k_from, batch, kv, n, last, stride_kn, stride_kd, D, BLOCK_N, BLOCK_D, False, TMA)
            s = tl.dot(q, k.T, input_precision=PRECISION)
            v = rows_from(v_from, batch, kv, n, last, stride_vn, stride_vd, D, BLOCK_N, BLOCK_D, False, TMA)
            acc, total, best = softmax_step(acc, total, best, s, v, log2_scale, False, PRECISION, SETTLE)
        # which rows these were, worked out again: kept over the loops, they would cost registers
        count = tl.load(plan_ptr + entry * (GROUP + 2) + 1, volatile=True)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query = row // count
        head = tl.load(plan_ptr + entry * (GROUP + 2) + 2 + row % count)
        valid = query < q_length
        blind = total == 0.0
        acc = acc / tl.where(blind, 1.0, total)[:, None]
        out_at = out_ptr + batch.to(tl.int64) * stride_ob + head.to(tl.int64)[:, None] * stride_oh
        out_at += query.to(tl.int64)[:, None] * stride_om + d[None, :] * stride_od
        if BLOCK_D != D:
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
        else:
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None])
        if WITH_LSE:
            lse = tl.where(blind, float("-inf"), (best + tl.log2(tl.where(blind, 1.0, total))) * 0.6931471805599453)
            tl.store(lse_ptr + (batch.to(tl.int64) * n_heads + head) * q_length + query, lse, mask=valid)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    groups: Plan,
    sink: int,
    window: int,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    config: dict[str, Any] | None = None,
) -> None:
    """Run the kernel over groups of heads."""
    batch, n_heads, q_length, d_head = q.shape
    n_kv, kv_length = k.shape[1], k.shape[2]
    settings = {**settings_for(d_head, q.dtype), **(config or {})}
    tiles = [-(-heads * q_length // settings["BLOCK_M"]) for heads in groups.most]
    grid = (groups.n_dense * tiles[0] + groups.n_streaming * tiles[1], batch)
    padded, rows, block_d = start is not None, groups.rows, max(16, triton.next_power_of_2(d_head))
    tma = hopper(q) and d_head in (64, 128, 256) and describable(k) and describable(v)
    box = [1, 1, settings["BLOCK_N"], d_head]
    kernel: Any = _hybrid
    kernel[grid](
        q, described(k, box) if tma else k, described(v, box) if tma else v, out, out if lse is None else lse, rows,
        start if padded else rows, end if padded else rows,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        n_heads, q_length, kv_length, groups.n_dense, groups.n_streaming, tiles[0], sink, window, scale,
        D=d_head, GROUP=n_heads // n_kv, BLOCK_D=block_d, PADDED=padded, WITH_LSE=lse is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", TMA=tma,
        SETTLE=hopper(q) and bool(settings.get("maxnreg")), enable_fp_fusion=True, **settings,
    )  # fmt: skip


def settings_for(d_head: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and the like, measured on an H200: two programs must fit a multiprocessor."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if d_head > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128}


def hopper(x: Tensor) -> bool:
    """Whether tensors are on a GPU of compute capability 9, whose matrix instructions and copies are asynchronous."""
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device)[0] == 9


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can stand for x: 16-byte strides, the last one 1, two bytes a number."""
    strides = [s * x.element_size() for s in x.stride()[:-1]]
    return (
        x.element_size() == 2
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s % 16 == 0 for s in strides)
    )


def described(x: Tensor, box: list[int]) -> Any:
    """A descriptor of x, read or written in boxes of the given shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)

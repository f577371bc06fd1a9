"""The Triton kernel: dense and streaming heads in one launch, heads of a key-value group packed in one tile."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_mllm.kernels.hybrid_attention.plan import plan


@triton.jit
@no_type_check  # the compiler reads the source, which no shape check may wrap
def _block(
    acc, total, best, q, k_base, v_base, n, place, first, last, sink, window,
    stride_kn, stride_kd, stride_vn, stride_vd, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys from n on, one step of the online softmax; MASKED asks which are seen, otherwise all are."""
    key = n + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k_at = k_base + key[None, :] * stride_kn + d[:, None] * stride_kd
    v_at = v_base + key[:, None] * stride_vn + d[None, :] * stride_vd
    if BLOCK_D != D:
        k = tl.load(k_at, mask=(key < last)[None, :] & (d < D)[:, None], other=0.0)
    elif MASKED:  # a mask over keys alone: rows are still read in whole vectors
        k = tl.load(k_at, mask=(key < last)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
    s = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        seen = (key[None, :] > place[:, None] - window) | (key < first + sink)[None, :]
        seen &= key[None, :] <= place[:, None]
        if PADDED:
            seen &= ((key >= first) & (key < last))[None, :]
        s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(best, tl.max(s, 1) * scale)
    if MASKED:
        base = tl.where(new == float("-inf"), 0.0, new)
    else:
        base = new
    p = tl.exp2(s * scale - base[:, None])
    shrink = tl.exp2(best - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if BLOCK_D != D:
        v = tl.load(v_at, mask=(key < last)[:, None] & (d < D)[None, :], other=0.0)
    elif MASKED:
        v = tl.load(v_at, mask=(key < last)[:, None], other=0.0)
    else:
        v = tl.load(v_at)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new


@triton.jit(do_not_specialize=["sink", "window"])
@no_type_check  # the compiler reads the source, which no shape check may wrap
def _hybrid(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, plan_ptr, start_ptr, end_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    n_heads, q_length, kv_length, n_dense, n_streaming, dense_tiles, streaming_tiles, sink, window, scale,
    D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PADDED: tl.constexpr, WITH_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows: positions of the heads of one group, position by position."""
    pid, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
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
        q_at = q_ptr + batch * stride_qb + head.to(tl.int64)[:, None] * stride_qh
        q_at += query.to(tl.int64)[:, None] * stride_qm + d[None, :] * stride_qd
        if BLOCK_D != D:
            q = tl.load(q_at, mask=valid[:, None] & (d < D)[None, :], other=0.0)
        else:
            q = tl.load(q_at, mask=valid[:, None], other=0.0)
        k_base = k_ptr + batch * stride_kb + kv.to(tl.int64) * stride_kh
        v_base = v_ptr + batch * stride_vb + kv.to(tl.int64) * stride_vh
        best = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        log2_scale = scale * 1.4426950408889634
        stop = tl.minimum(highest + 1, last)  # no row sees keys behind it
        begin = first // BLOCK_N * BLOCK_N
        sink_end = tl.where(sink > 0, tl.cdiv(first + sink, BLOCK_N) * BLOCK_N, begin)
        low = tl.maximum(tl.maximum(lowest - window + 1, 0) // BLOCK_N * BLOCK_N, sink_end)
        # from full_low to full_high, every row sees every key
        full_low = tl.cdiv(tl.maximum(tl.maximum(highest - window + 1, first), 0), BLOCK_N) * BLOCK_N
        full_low = tl.maximum(full_low, low)
        full_high = tl.maximum(tl.minimum(lowest + 1, last) // BLOCK_N * BLOCK_N, full_low)
        sinks = tl.maximum(tl.cdiv(tl.minimum(sink_end, stop) - begin, BLOCK_N), 0)
        leads = sinks + tl.maximum(tl.cdiv(tl.minimum(full_low, stop) - low, BLOCK_N), 0)
        edges = leads + tl.maximum(tl.cdiv(stop - full_high, BLOCK_N), 0)
        for i in tl.range(0, edges):  # the sink, the beginning of the window, the diagonal
            n = tl.where(i < leads, low + (i - sinks) * BLOCK_N, full_high + (i - leads) * BLOCK_N)
            n = tl.where(i < sinks, begin + i * BLOCK_N, n)
            acc, total, best = _block(
                acc, total, best, q, k_base, v_base, n, place, first, last, sink, window, stride_kn, stride_kd,
                stride_vn, stride_vd, log2_scale, D, BLOCK_N, BLOCK_D, True, PADDED, PRECISION)  # fmt: skip
        for n in tl.range(full_low, full_high, BLOCK_N):
            acc, total, best = _block(
                acc, total, best, q, k_base, v_base, n, place, first, last, sink, window, stride_kn, stride_kd,
                stride_vn, stride_vd, log2_scale, D, BLOCK_N, BLOCK_D, False, PADDED, PRECISION)  # fmt: skip
        # which rows these were, worked out again: kept over the loops, they would cost registers
        count = tl.load(plan_ptr + entry * (GROUP + 2) + 1, volatile=True)
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        query = row // count
        head = tl.load(plan_ptr + entry * (GROUP + 2) + 2 + row % count)
        valid = query < q_length
        blind = total == 0.0
        acc = acc / tl.where(blind, 1.0, total)[:, None]
        out_at = out_ptr + batch * stride_ob + head.to(tl.int64)[:, None] * stride_oh
        out_at += query.to(tl.int64)[:, None] * stride_om + d[None, :] * stride_od
        if BLOCK_D != D:
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
        else:
            tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None])
        if WITH_LSE:
            lse = tl.where(blind, float("-inf"), (best + tl.log2(tl.where(blind, 1.0, total))) * 0.6931471805599453)
            tl.store(lse_ptr + (batch * n_heads + head) * q_length + query, lse, mask=valid)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    rows: Tensor,
    n_dense: int,
    most: tuple[int, int],
    sink: int,
    window: int,
    scale: float,
    start: Tensor | None,
    end: Tensor | None,
    config: dict[str, Any] | None = None,
) -> None:
    """Run the kernel over the groups of heads in `rows`, of which the first `n_dense` are dense."""
    batch, n_heads, q_length, d_head = q.shape
    n_kv, kv_length = k.shape[1], k.shape[2]
    settings = {**settings_for(d_head, q.dtype), **(config or {})}
    n_streaming = len(rows) - n_dense
    tiles = [-(-heads * q_length // settings["BLOCK_M"]) for heads in most]
    grid = (n_dense * tiles[0] + n_streaming * tiles[1], batch)
    padded = start is not None
    kernel: Any = _hybrid
    kernel[grid](
        q, k, v, out, out if lse is None else lse, rows, start if padded else rows, end if padded else rows,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        n_heads, q_length, kv_length, n_dense, n_streaming, *tiles, sink, window, scale,
        D=d_head, GROUP=n_heads // n_kv, BLOCK_D=max(16, triton.next_power_of_2(d_head)), PADDED=padded,
        WITH_LSE=lse is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **settings,
    )  # fmt: skip


def settings_for(d_head: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and the like, measured on an H200: two programs must fit a multiprocessor."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if d_head > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128}


def triton_hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dense: tuple[int, ...],
    sink: int,
    window: int,
    scale: float,
    start: Tensor | None = None,
    end: Tensor | None = None,
    with_lse: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All heads in one launch; see `hybrid_attention`."""
    rows, n_dense, *most = plan(dense, q.shape[1], k.shape[1], q.device)
    # [batch query head d_head] in memory: what the output projection reads
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if with_lse else None
    launch(q, k, v, out, lse, rows, n_dense, (most[0], most[1]), sink, window, scale, start, end, config)
    return out, lse

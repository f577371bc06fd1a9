"""The Triton kernels: one pass for the size of each row's softmax, one for the weighted sum of the rows."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check  # the compiler reads the source, which no shape check may wrap
def _layer(table, q_like, k_like, ALIGNED: tl.constexpr):
    """What the table says of a layer: where q and k begin, and the scale."""
    q_base = tl.load(table).to(q_like.dtype)
    k_base = tl.load(table + 1).to(k_like.dtype)
    if ALIGNED:
        q_base, k_base = tl.multiple_of(q_base, [16]), tl.multiple_of(k_base, [16])
    scale = tl.load(table + 2).to(tl.int32).to(tl.float32, bitcast=True)
    return q_base, k_base, scale


@triton.jit
@no_type_check
def _rows(table, place_ptr, stride_pb, batch, head0, tile, length,
          KINDS: tl.constexpr, HB: tl.constexpr, QB: tl.constexpr, FACTS: tl.constexpr):  # fmt: skip
    """Of each row of a tile its query, its place among the keys, and whether its head is dense; head by head."""
    row = tl.arange(0, HB * QB)
    query = tl.minimum(tile * QB + row % QB, length - 1)  # rows beyond the last repeat it
    place = tl.load(place_ptr + batch * stride_pb + query).to(tl.int32)
    dense = row >= 0
    if KINDS:
        head = head0 + row // QB
        dense = ((tl.load(table + FACTS + head // 32) >> (head % 32)) & 1) == 1
    return query, place, dense


@triton.jit
@no_type_check
def _spans(low, high, place, dense, first, last, table, N: tl.constexpr, KINDS: tl.constexpr):
    """Where a tile needs keys between low and high: some at the edges, which must be masked, and all in between.

    The edges are `leads` blocks from `low` and more from `tail`; from `full` to `full_end` every row sees every key.
    """
    nearest, farthest = tl.min(place, 0), tl.max(place, 0)
    stop = tl.minimum(high, tl.minimum(farthest + 1, last))
    low = tl.maximum(low, first // N * N)
    sink, window = 0, 0
    if KINDS:
        sink, window = tl.load(table + 3).to(tl.int32), tl.load(table + 4).to(tl.int32)
        any_dense = tl.max(dense.to(tl.int32), 0) > 0
        lead_end = tl.where(any_dense, low, tl.cdiv(first + sink, N) * N)
        tail = tl.where(any_dense, low, tl.maximum(nearest - window + 1, 0) // N * N)
        tail = tl.maximum(tl.maximum(tail, lead_end), low)
        full, full_end = tail, tail
    else:
        lead_end = tl.maximum(tl.cdiv(first, N) * N, low)
        full = lead_end
        full_end = tl.maximum(tl.minimum(tl.minimum(nearest + 1, last), high) // N * N, full)
        tail = full_end
    leads = tl.maximum(tl.cdiv(tl.minimum(lead_end, stop) - low, N), 0)
    edges = leads + tl.maximum(tl.cdiv(stop - tail, N), 0)
    return low, leads, edges, tail, full, full_end, sink, window


@triton.jit
@no_type_check
def _keys(k_base, n, stride_kn, stride_kd, last, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """N keys from n on, as columns [d_head key]; MASKED: those from `last` on are not read."""
    key, d = tl.arange(0, N), tl.arange(0, BLOCK_D)
    at = k_base + tl.cast(n, tl.int64) * stride_kn + key[None, :] * stride_kn + d[:, None] * stride_kd
    if BLOCK_D != D:
        k = tl.load(at, mask=(n + key < last)[None, :] & (d < D)[:, None], other=0.0)
    elif MASKED:
        k = tl.load(at, mask=(n + key < last)[None, :], other=0.0)
    else:
        k = tl.load(at)
    return k


@triton.jit
@no_type_check
def _queries(q_base, query, head, stride_qh, stride_qm, stride_qd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = (
        q_base
        + head.to(tl.int64)[:, None] * stride_qh
        + query.to(tl.int64)[:, None] * stride_qm
        + d[None, :] * stride_qd
    )
    if BLOCK_D != D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
@no_type_check
def _seen(key, place, dense, first, last, sink, window, KINDS: tl.constexpr):
    """Which keys the rows see; `key` and the others broadcast against each other."""
    seen = (key <= place) & (key >= first) & (key < last)
    if KINDS:
        seen &= (key > place - window) | (key < first + sink) | dense
    return seen


@triton.jit
@no_type_check
def _size_step(best, total, q, k_base, n, stride_kn, stride_kd, place, dense, first, last, sink, window, scale,
               N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KINDS: tl.constexpr, MASKED: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """One step of the online softmax: the largest score so far, and the sum of exponentials relative to it."""
    s = tl.dot(q, _keys(k_base, n, stride_kn, stride_kd, last, N, D, BLOCK_D, MASKED), input_precision=PRECISION)
    if MASKED:
        key = (n + tl.arange(0, N))[None, :]
        seen = _seen(key, place[:, None], dense[:, None], first, last, sink, window, KINDS)
        s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(best, tl.max(s, 1) * scale)
    base = tl.where(new == float("-inf"), 0.0, new)
    total = total * tl.exp2(best - base) + tl.sum(tl.exp2(s * scale - base[:, None]), 1)
    return new, total


@triton.jit(do_not_specialize=["length", "chunk", "n_layers"])
@no_type_check
def sizes(
    table, q_like, k_like, place_ptr, start_ptr, end_ptr, best_ptr, total_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_pb,
    stride_sl, stride_el, n_kv, n_keys, n_layers, length, chunk, head_tiles, query_tiles, WORDS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HB: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
    PADDED: tl.constexpr, KINDS: tl.constexpr, ALIGNED: tl.constexpr, FACTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest score and sum of exponentials of some rows of one layer over one chunk of keys."""
    pid, layer = tl.program_id(0), tl.program_id(2)
    kv, batch = tl.program_id(1) % n_kv, (tl.program_id(1) // n_kv).to(tl.int64)
    tiles = head_tiles * query_tiles
    split, tile = pid // tiles, pid % tiles % query_tiles
    member = pid % tiles // query_tiles * HB
    table += layer * (FACTS + WORDS)
    q_base, k_base, scale = _layer(table, q_like, k_like, ALIGNED)
    query, place, dense = _rows(
        table, place_ptr, stride_pb, batch, kv * GROUP + member, tile, length, KINDS, HB, QB, FACTS
    )
    first, last = 0, n_keys
    if PADDED:
        first, last = tl.load(start_ptr + layer * stride_sl + batch), tl.load(end_ptr + layer * stride_el + batch)
    row = tl.arange(0, HB * QB)
    head = kv * GROUP + tl.minimum(member + row // QB, GROUP - 1)
    q = _queries(q_base + batch * stride_qb, query, head, stride_qh, stride_qm, stride_qd, D, BLOCK_D)
    k_base += batch * stride_kb + kv.to(tl.int64) * stride_kh
    low, leads, edges, tail, full, full_end, sink, window = _spans(
        split * chunk, tl.minimum(split * chunk + chunk, n_keys), place, dense, first, last, table, N, KINDS
    )
    best = tl.full([HB * QB], float("-inf"), tl.float32)
    total = tl.zeros([HB * QB], tl.float32)
    for n in tl.range(full, full_end, N):
        best, total = _size_step(best, total, q, k_base, n, stride_kn, stride_kd, place, dense, first, last, sink,
                                 window, scale, N, D, BLOCK_D, KINDS, False, PRECISION)  # fmt: skip
    for i in tl.range(0, edges):
        n = tl.where(i < leads, low + i * N, tail + (i - leads) * N)
        best, total = _size_step(best, total, q, k_base, n, stride_kn, stride_kd, place, dense, first, last, sink,
                                 window, scale, N, D, BLOCK_D, KINDS, True, PRECISION)  # fmt: skip
    n_batch = tl.num_programs(1) // n_kv
    at = ((split * n_layers + layer).to(tl.int64) * n_batch + batch) * (n_kv * GROUP) + head
    at = at * length + query
    own = (member + row // QB < GROUP) & (tile * QB + row % QB < length)
    tl.store(best_ptr + at, best, mask=own)
    tl.store(total_ptr + at, total, mask=own)


@triton.jit
@no_type_check
def merge(best_ptr, total_ptr, rows, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Of each row, what its chunks found, joined; in the place of the first chunk's."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    at = split.to(tl.int64)[:, None] * rows + row[None, :]
    there = (split < splits)[:, None] & (row < rows)[None, :]
    best = tl.load(best_ptr + at, mask=there, other=float("-inf"))
    total = tl.load(total_ptr + at, mask=there, other=0.0)
    most = tl.max(best, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(total * tl.exp2(best - base[None, :]), 0)
    tl.debug_barrier()  # all is read before the first chunk's places are written
    tl.store(best_ptr + row, most, mask=row < rows)
    tl.store(total_ptr + row, total, mask=row < rows)


@triton.jit
@no_type_check
def _sum_step(out_at, add, n, q, k_base, stride_kn, stride_kd, place, dense, first, last, sink, window, scale, size,
              stop, n_keys, members, HB: tl.constexpr, QB: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr, KINDS: tl.constexpr, MASKED: tl.constexpr, ADD: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Write, or add, the weighted sum of the rows at N keys."""
    k = _keys(k_base, n, stride_kn, stride_kd, last, N, D, BLOCK_D, MASKED)
    key, head = n + tl.arange(0, N), tl.arange(0, HB)
    s = tl.dot(tl.trans(k), tl.trans(q), input_precision=PRECISION)  # [key row]: sums stay within few threads
    p = tl.exp2(s * scale - size[None, :])
    if MASKED:
        p = tl.where(_seen(key[:, None], place[None, :], dense[None, :], first, last, sink, window, KINDS), p, 0.0)
    sums = tl.sum(tl.reshape(p, [N, HB, QB]), 2)
    at = out_at + head.to(tl.int64)[None, :] * n_keys + key[:, None]
    there = (key < stop)[:, None] & (head < members)[None, :]
    if ADD:
        if add:
            sums += tl.load(at, mask=there, other=0.0)
    tl.store(at, sums, mask=there)


@triton.jit(do_not_specialize=["length", "chunk"])
@no_type_check
def sums(
    table, q_like, k_like, place_ptr, weight_ptr, start_ptr, end_ptr, best_ptr, total_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_pb, stride_wb,
    stride_sl, stride_el, n_kv, n_keys, length, chunk, head_tiles, query_tiles, WORDS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HB: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
    PADDED: tl.constexpr, KINDS: tl.constexpr, ALIGNED: tl.constexpr, FACTS: tl.constexpr, SEVERAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The profile of some heads of one layer at one chunk of keys, tile of queries by tile of queries."""
    pid, layer = tl.program_id(0), tl.program_id(2)
    kv, batch = tl.program_id(1) % n_kv, (tl.program_id(1) // n_kv).to(tl.int64)
    low, member = pid // head_tiles * chunk, pid % head_tiles * HB
    high = tl.minimum(low + chunk, n_keys)
    n_batch = tl.num_programs(1) // n_kv
    table += layer * (FACTS + WORDS)
    q_base, k_base, scale = _layer(table, q_like, k_like, ALIGNED)
    first, last = 0, n_keys
    if PADDED:
        first, last = tl.load(start_ptr + layer * stride_sl + batch), tl.load(end_ptr + layer * stride_el + batch)
    row = tl.arange(0, HB * QB)
    head = kv * GROUP + tl.minimum(member + row // QB, GROUP - 1)
    k_base += batch * stride_kb + kv.to(tl.int64) * stride_kh
    rows_at = (layer * n_batch + batch) * (n_kv * GROUP)
    out_at = out_ptr + (rows_at + kv * GROUP + member) * n_keys
    members = GROUP - member
    for n in range(low, high, N):  # what no row sees stays 0
        key, own = n + tl.arange(0, N), tl.arange(0, HB)
        at = out_at + own.to(tl.int64)[None, :] * n_keys + key[:, None]
        tl.store(at, tl.zeros([N, HB], tl.float32), mask=(key < high)[:, None] & (own < members)[None, :])
    for tile in range(query_tiles):
        tl.debug_barrier()  # what is added to has been written
        query, place, dense = _rows(
            table, place_ptr, stride_pb, batch, kv * GROUP + member, tile, length, KINDS, HB, QB, FACTS
        )
        begin, leads, edges, tail, full, full_end, sink, window = _spans(
            low, high, place, dense, first, last, table, N, KINDS
        )
        q = _queries(q_base + batch * stride_qb, query, head, stride_qh, stride_qm, stride_qd, D, BLOCK_D)
        at = (rows_at + head) * length + query
        best, total = tl.load(best_ptr + at), tl.load(total_ptr + at)
        weight = tl.load(weight_ptr + batch * stride_wb + query, mask=tile * QB + row % QB < length, other=0.0)
        # exp2(score - size) is the row's share: weight and sum are taken in; infinite for a row that counts as 0
        counts = (total != 0.0) & (weight != 0.0)
        size = best + tl.log2(tl.where(counts, total, 1.0) / tl.where(counts, weight, 1.0))
        size = tl.where(counts, size, float("inf"))
        for n in tl.range(full, full_end, N):
            _sum_step(out_at, tile > 0, n, q, k_base, stride_kn, stride_kd, place, dense, first, last, sink, window,
                      scale, size, high, n_keys, members, HB, QB, N, D, BLOCK_D, KINDS, False, SEVERAL,
                      PRECISION)  # fmt: skip
        for i in tl.range(0, edges):
            n = tl.where(i < leads, begin + i * N, tail + (i - leads) * N)
            _sum_step(out_at, tile > 0, n, q, k_base, stride_kn, stride_kd, place, dense, first, last, sink, window,
                      scale, size, high, n_keys, members, HB, QB, N, D, BLOCK_D, KINDS, True, SEVERAL,
                      PRECISION)  # fmt: skip

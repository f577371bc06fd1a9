"""The Triton kernels: a pass for the maximum and the sum of each row's softmax, one for the weighted sum of the rows.

A row is one query of one head. A tile has HB heads of a key-value group times QB queries, ordered head by head, against
N keys. Scores are in base 2: the scale contains log2(e).
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check  # the compiler reads the source: shape checks must not wrap the function
def _layer(table, q_like, k_like, ALIGNED: tl.constexpr):
    """The addresses of a layer's q and k, and its scale, from the table."""
    q_base = tl.load(table).to(q_like.dtype)
    k_base = tl.load(table + 1).to(k_like.dtype)
    if ALIGNED:
        q_base, k_base = tl.multiple_of(q_base, [16]), tl.multiple_of(k_base, [16])
    scale = tl.load(table + 2).to(tl.int32).to(tl.float32, bitcast=True)
    return q_base, k_base, scale


@triton.jit
@no_type_check
def _rows(table, position_ptr, stride_pb, batch, head0, tile, length,
          STREAMING: tl.constexpr, HB: tl.constexpr, QB: tl.constexpr, HEADER: tl.constexpr):  # fmt: skip
    """The query of each row of a tile, its position among the keys, and whether its head is dense."""
    row = tl.arange(0, HB * QB)
    query = tl.minimum(tile * QB + row % QB, length - 1)  # rows after the last query repeat it
    position = tl.load(position_ptr + batch * stride_pb + query).to(tl.int32)
    dense = row >= 0  # all True
    if STREAMING:  # one bit for each head, in words of 32
        head = head0 + row // QB
        dense = ((tl.load(table + HEADER + head // 32) >> (head % 32)) & 1) == 1
    return query, position, dense


@triton.jit
@no_type_check
def _spans(low, high, position, dense, first, last, table, N: tl.constexpr, STREAMING: tl.constexpr):
    """The keys from `low` to `high` that a tile needs: blocks at the edges, which are masked, and those in between.

    The first `lead_blocks` of `edge_blocks` start at `low`, the others at `tail`. From `full` to `full_end` every row
    sees every key. Keys in none of these are seen by no row.
    """
    nearest, farthest = tl.min(position, 0), tl.max(position, 0)
    stop = tl.minimum(high, tl.minimum(farthest + 1, last))
    low = tl.maximum(low, first // N * N)
    sink, window = 0, 0
    if STREAMING:  # the sink, then from the start of the window on; everything as soon as one row is dense
        sink, window = tl.load(table + 3).to(tl.int32), tl.load(table + 4).to(tl.int32)
        any_dense = tl.max(dense.to(tl.int32), 0) > 0
        lead_end = tl.where(any_dense, low, tl.cdiv(first + sink, N) * N)
        tail = tl.where(any_dense, low, tl.maximum(nearest - window + 1, 0) // N * N)
        tail = tl.maximum(tl.maximum(tail, lead_end), low)
        full, full_end = tail, tail
    else:  # blocks around the first real key and the diagonal
        lead_end = tl.maximum(tl.cdiv(first, N) * N, low)
        full = lead_end
        full_end = tl.maximum(tl.minimum(tl.minimum(nearest + 1, last), high) // N * N, full)
        tail = full_end
    lead_blocks = tl.maximum(tl.cdiv(tl.minimum(lead_end, stop) - low, N), 0)
    edge_blocks = lead_blocks + tl.maximum(tl.cdiv(stop - tail, N), 0)
    return low, lead_blocks, edge_blocks, tail, full, full_end, sink, window


@triton.jit
@no_type_check
def _keys(k_base, n, stride_kn, stride_kd, last, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """N keys from n on, as columns `[d_head key]`; with MASKED, those from `last` on are not read."""
    key, d = tl.arange(0, N), tl.arange(0, BLOCK_D)
    pointers = k_base + tl.cast(n, tl.int64) * stride_kn + key[None, :] * stride_kn + d[:, None] * stride_kd
    if BLOCK_D != D:
        k = tl.load(pointers, mask=(n + key < last)[None, :] & (d < D)[:, None], other=0.0)
    elif MASKED:
        k = tl.load(pointers, mask=(n + key < last)[None, :], other=0.0)
    else:
        k = tl.load(pointers)
    return k


@triton.jit
@no_type_check
def _queries(q_base, query, head, stride_qh, stride_qm, stride_qd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The queries of a tile, `[row d_head]`."""
    d = tl.arange(0, BLOCK_D)
    pointers = q_base + head.to(tl.int64)[:, None] * stride_qh + query.to(tl.int64)[:, None] * stride_qm
    pointers += d[None, :] * stride_qd
    if BLOCK_D != D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
@no_type_check
def _seen(key, position, dense, first, last, sink, window, STREAMING: tl.constexpr):
    """The keys that rows see; `key` and the row's arguments broadcast against each other."""
    seen = (key <= position) & (key >= first) & (key < last)
    if STREAMING:
        seen &= (key > position - window) | (key < first + sink) | dense
    return seen


@triton.jit
@no_type_check
def _statistics_step(
    row_max, row_sum, q, k_base, n, stride_kn, stride_kd, position, dense, first, last, sink, window, scale,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STREAMING: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the largest score so far, and the sum of exponentials relative to it."""
    # [row key]
    s = tl.dot(q, _keys(k_base, n, stride_kn, stride_kd, last, N, D, BLOCK_D, MASKED), input_precision=PRECISION)
    if MASKED:
        key = (n + tl.arange(0, N))[None, :]
        seen = _seen(key, position[:, None], dense[:, None], first, last, sink, window, STREAMING)
        s = tl.where(seen, s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf would be NaN
    row_sum = row_sum * tl.exp2(row_max - base) + tl.sum(tl.exp2(s * scale - base[:, None]), 1)
    return new_max, row_sum


@triton.jit(do_not_specialize=["length", "chunk", "n_layers"])
@no_type_check
def row_statistics(
    table, q_like, k_like, position_ptr, start_ptr, end_ptr, max_ptr, sum_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_pb,
    stride_sl, stride_el, n_kv, n_keys, n_layers, length, chunk, head_tiles, query_tiles, WORDS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HB: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
    PADDED: tl.constexpr, STREAMING: tl.constexpr, ALIGNED: tl.constexpr, HEADER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest score and sum of exponentials of the rows of a tile of one layer over one chunk of keys."""
    # grid: [(split head_tile query_tile) (batch kv_head) layer]
    pid, layer = tl.program_id(0), tl.program_id(2)
    kv, batch = tl.program_id(1) % n_kv, (tl.program_id(1) // n_kv).to(tl.int64)
    tiles = head_tiles * query_tiles
    split, tile = pid // tiles, pid % tiles % query_tiles
    group_head = pid % tiles // query_tiles * HB
    table += layer * (HEADER + WORDS)
    q_base, k_base, scale = _layer(table, q_like, k_like, ALIGNED)
    query, position, dense = _rows(
        table, position_ptr, stride_pb, batch, kv * GROUP + group_head, tile, length, STREAMING, HB, QB, HEADER
    )
    first, last = 0, n_keys
    if PADDED:
        first, last = tl.load(start_ptr + layer * stride_sl + batch), tl.load(end_ptr + layer * stride_el + batch)
    row = tl.arange(0, HB * QB)  # [(head query)] of the tile
    head = kv * GROUP + tl.minimum(group_head + row // QB, GROUP - 1)  # rows after the last head repeat it
    q = _queries(q_base + batch * stride_qb, query, head, stride_qh, stride_qm, stride_qd, D, BLOCK_D)
    k_base += batch * stride_kb + kv.to(tl.int64) * stride_kh
    low, lead_blocks, edge_blocks, tail, full, full_end, sink, window = _spans(
        split * chunk, tl.minimum(split * chunk + chunk, n_keys), position, dense, first, last, table, N, STREAMING
    )
    row_max = tl.full([HB * QB], float("-inf"), tl.float32)
    row_sum = tl.zeros([HB * QB], tl.float32)
    for n in tl.range(full, full_end, N):  # every row sees every key
        row_max, row_sum = _statistics_step(
            row_max, row_sum, q, k_base, n, stride_kn, stride_kd, position, dense, first, last, sink, window, scale,
            N, D, BLOCK_D, STREAMING, False, PRECISION)  # fmt: skip
    for i in tl.range(0, edge_blocks):  # masked
        n = tl.where(i < lead_blocks, low + i * N, tail + (i - lead_blocks) * N)
        row_max, row_sum = _statistics_step(
            row_max, row_sum, q, k_base, n, stride_kn, stride_kd, position, dense, first, last, sink, window, scale,
            N, D, BLOCK_D, STREAMING, True, PRECISION)  # fmt: skip
    n_batch = tl.num_programs(1) // n_kv
    # offsets in [split layer batch head query]
    offsets = ((split * n_layers + layer).to(tl.int64) * n_batch + batch) * (n_kv * GROUP) + head
    offsets = offsets * length + query
    in_range = (group_head + row // QB < GROUP) & (tile * QB + row % QB < length)  # not the repeated rows
    tl.store(max_ptr + offsets, row_max, mask=in_range)
    tl.store(sum_ptr + offsets, row_sum, mask=in_range)


@triton.jit
@no_type_check
def merge(max_ptr, sum_ptr, rows, splits, SPLITS: tl.constexpr, ROWS: tl.constexpr):
    """Merge the maxima and sums of a row's chunks of keys, `[split row]`, into those of the first chunk."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.arange(0, SPLITS)
    offsets = split.to(tl.int64)[:, None] * rows + row[None, :]
    in_range = (split < splits)[:, None] & (row < rows)[None, :]
    chunk_max = tl.load(max_ptr + offsets, mask=in_range, other=float("-inf"))
    chunk_sum = tl.load(sum_ptr + offsets, mask=in_range, other=0.0)
    row_max = tl.max(chunk_max, 0)
    base = tl.where(row_max == float("-inf"), 0.0, row_max)  # -inf - -inf would be NaN
    row_sum = tl.sum(chunk_sum * tl.exp2(chunk_max - base[None, :]), 0)
    tl.debug_barrier()  # everything is read before the first chunk's entries are overwritten
    tl.store(max_ptr + row, row_max, mask=row < rows)
    tl.store(sum_ptr + row, row_sum, mask=row < rows)


@triton.jit
@no_type_check
def _weighted_sum_step(
    out_ptr, add, n, q, k_base, stride_kn, stride_kd, position, dense, first, last, sink, window, scale, size,
    stop, n_keys, members, HB: tl.constexpr, QB: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, STREAMING: tl.constexpr, MASKED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write, or add, the weighted sum of the rows at N keys."""
    k = _keys(k_base, n, stride_kn, stride_kd, last, N, D, BLOCK_D, MASKED)
    key, head = n + tl.arange(0, N), tl.arange(0, HB)
    s = tl.dot(tl.trans(k), tl.trans(q), input_precision=PRECISION)  # [key row]: few threads take part in a row's sum
    p = tl.exp2(s * scale - size[None, :])
    if MASKED:
        seen = _seen(key[:, None], position[None, :], dense[None, :], first, last, sink, window, STREAMING)
        p = tl.where(seen, p, 0.0)
    profile = tl.sum(tl.reshape(p, [N, HB, QB]), 2)  # [key (head query)] -> [key head]
    pointers = out_ptr + head.to(tl.int64)[None, :] * n_keys + key[:, None]
    in_range = (key < stop)[:, None] & (head < members)[None, :]
    if ADD:
        if add:
            profile += tl.load(pointers, mask=in_range, other=0.0)
    tl.store(pointers, profile, mask=in_range)


@triton.jit(do_not_specialize=["length", "chunk"])
@no_type_check
def weighted_sums(
    table, q_like, k_like, position_ptr, weight_ptr, start_ptr, end_ptr, max_ptr, sum_ptr, out_ptr,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd, stride_pb, stride_wb,
    stride_sl, stride_el, n_kv, n_keys, length, chunk, head_tiles, query_tiles, WORDS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HB: tl.constexpr, QB: tl.constexpr, N: tl.constexpr,
    PADDED: tl.constexpr, STREAMING: tl.constexpr, ALIGNED: tl.constexpr, HEADER: tl.constexpr, SEVERAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The profile of HB heads of one layer at one chunk of keys, one tile of queries after the other."""
    # grid: [(split head_tile) (batch kv_head) layer]; each entry of the result belongs to one program
    pid, layer = tl.program_id(0), tl.program_id(2)
    kv, batch = tl.program_id(1) % n_kv, (tl.program_id(1) // n_kv).to(tl.int64)
    low, group_head = pid // head_tiles * chunk, pid % head_tiles * HB
    high = tl.minimum(low + chunk, n_keys)
    n_batch = tl.num_programs(1) // n_kv
    table += layer * (HEADER + WORDS)
    q_base, k_base, scale = _layer(table, q_like, k_like, ALIGNED)
    first, last = 0, n_keys
    if PADDED:
        first, last = tl.load(start_ptr + layer * stride_sl + batch), tl.load(end_ptr + layer * stride_el + batch)
    row = tl.arange(0, HB * QB)
    head = kv * GROUP + tl.minimum(group_head + row // QB, GROUP - 1)
    k_base += batch * stride_kb + kv.to(tl.int64) * stride_kh
    head_base = (layer * n_batch + batch) * (n_kv * GROUP)  # of [layer batch head]
    out_ptr += (head_base + kv * GROUP + group_head) * n_keys
    members = GROUP - group_head
    for n in range(low, high, N):  # keys that no row sees stay 0
        key, tile_head = n + tl.arange(0, N), tl.arange(0, HB)
        pointers = out_ptr + tile_head.to(tl.int64)[None, :] * n_keys + key[:, None]
        in_range = (key < high)[:, None] & (tile_head < members)[None, :]
        tl.store(pointers, tl.zeros([N, HB], tl.float32), mask=in_range)
    for tile in range(query_tiles):
        tl.debug_barrier()  # the values to which this tile adds are written
        query, position, dense = _rows(
            table, position_ptr, stride_pb, batch, kv * GROUP + group_head, tile, length, STREAMING, HB, QB, HEADER
        )
        begin, lead_blocks, edge_blocks, tail, full, full_end, sink, window = _spans(
            low, high, position, dense, first, last, table, N, STREAMING
        )
        q = _queries(q_base + batch * stride_qb, query, head, stride_qh, stride_qm, stride_qd, D, BLOCK_D)
        offsets = (head_base + head) * length + query
        row_max, row_sum = tl.load(max_ptr + offsets), tl.load(sum_ptr + offsets)
        weight = tl.load(weight_ptr + batch * stride_wb + query, mask=tile * QB + row % QB < length, other=0.0)
        # exp2(score - size) = weight * exp2(score - max) / sum; the size of a row that counts as 0 is infinite
        counts = (row_sum != 0.0) & (weight != 0.0)
        size = row_max + tl.log2(tl.where(counts, row_sum, 1.0) / tl.where(counts, weight, 1.0))
        size = tl.where(counts, size, float("inf"))
        for n in tl.range(full, full_end, N):  # every row sees every key
            _weighted_sum_step(
                out_ptr, tile > 0, n, q, k_base, stride_kn, stride_kd, position, dense, first, last, sink, window,
                scale, size, high, n_keys, members, HB, QB, N, D, BLOCK_D, STREAMING, False, SEVERAL,
                PRECISION)  # fmt: skip
        for i in tl.range(0, edge_blocks):  # masked
            n = tl.where(i < lead_blocks, begin + i * N, tail + (i - lead_blocks) * N)
            _weighted_sum_step(
                out_ptr, tile > 0, n, q, k_base, stride_kn, stride_kd, position, dense, first, last, sink, window,
                scale, size, high, n_keys, members, HB, QB, N, D, BLOCK_D, STREAMING, True, SEVERAL,
                PRECISION)  # fmt: skip

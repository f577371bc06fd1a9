"""Launches the Triton kernels: tiles, chunks of keys, and a table of the layers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from hooked_mllm.kernels.attention_profile import triton as kernels
from hooked_mllm.kernels.attention_profile.naive import Streaming
from hooked_mllm.kernels.implementations import Keys, Queries, current_device

#: columns of a layer's row in the table, before the words of 32 flags
HEADER = 5
#: Triton 3.9 warns unless it is specified whether multiplications and additions are fused
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
LOG2_E = 1.4426950408889634
#: programs of a pass for each multiprocessor, and the largest number of chunks of keys
PROGRAMS, MOST_PARTS = 4, 128


def settings_for(d_head: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and keys of a tile, warps and stages, measured on an H200."""
    if dtype == torch.float32:
        return {"ROWS": 32, "N": 32, "num_warps": 4, "num_stages": 1}
    return {"ROWS": 128, "N": 64, "num_warps": 4, "num_stages": 3 if d_head <= 128 else 2}


def tile_shape(rows: int, group: int, length: int) -> tuple[int, int]:
    """Heads and queries of a tile of at most `rows` rows: all queries if they fit, then heads of the group."""
    queries = min(triton.next_power_of_2(length), rows)
    heads = min(triton.next_power_of_2(group), rows // queries)
    return heads, max(queries, 16 // heads)


def layer_table(
    q: Sequence[Tensor], k: Sequence[Tensor], scale: Sequence[float], streaming: Sequence[Streaming | None]
) -> Int64[np.ndarray, "layer column"]:
    """A row for each layer: addresses of q and k, the scale's bits, sink, window, and a bit for each dense head."""
    n_heads, n_keys = q[0].shape[1], k[0].shape[2]
    words = -(-n_heads // 32) if any(item is not None for item in streaming) else 0
    table = np.zeros((len(q), HEADER + words), dtype=np.int64)
    for layer, item in enumerate(streaming):
        table[layer, :2] = q[layer].data_ptr(), k[layer].data_ptr()
        if words:
            dense, sink, window = (range(n_heads), 0, 1) if item is None else item
            table[layer, 3:HEADER] = min(sink, n_keys), min(window, n_keys)  # larger ones have the same effect
            for head in dense:  # one bit per head, in words of 32
                table[layer, HEADER + head // 32] |= 1 << head % 32
    table[:, 2] = (np.array(scale) * LOG2_E).astype(np.float32).view(np.int32)
    return table


def triton_attention_profile(
    q: Sequence[Queries], k: Sequence[Keys], scale: Sequence[float],
    places: Int[Tensor, "batch query"], weight: Float[Tensor, "batch query"],
    start: Int[Tensor, "*layer batch"] | None, end: Int[Tensor, "*layer batch"] | None,
    streaming: Sequence[Streaming | None], config: dict[str, int] | None = None,
    out: Float[Tensor, "layer batch head key"] | None = None, splits: int | None = None,
) -> Float[Tensor, "layer batch head key"]:  # fmt: skip
    """`attention_profile` in one launch for each pass; `config` and `splits` replace tile sizes and chunk count."""
    # one launch for all layers: a table has the addresses of their q and k, which share shape and strides
    q, k = _equal_strides(q), _equal_strides(k)
    n_layers, (batch, n_heads, length, d_head), (n_kv, n_keys) = len(q), q[0].shape, k[0].shape[1:3]
    device, group, dtype = q[0].device, n_heads // n_kv, q[0].dtype
    host_table = layer_table(q, k, scale, streaming)
    table = torch.from_numpy(host_table).to(device, non_blocking=True)
    places, weight = (_unit_last_stride(x, device) for x in (places, weight))
    padded = start is not None or end is not None
    bounds = [_bound(start, 0, batch, device), _bound(end, n_keys, batch, device)] if padded else [table, table]
    tiling = _Tiling(config or settings_for(d_head, dtype), group, length, n_keys)
    constants = {
        "WORDS": host_table.shape[1] - HEADER, "GROUP": group, "D": d_head,
        "BLOCK_D": max(16, triton.next_power_of_2(d_head)), "PADDED": padded,
        "STREAMING": host_table.shape[1] > HEADER, "ALIGNED": not bool((host_table[:, :2] % 16).any()),  # addresses
        "HEADER": HEADER, "PRECISION": "ieee" if dtype == torch.float32 else "tf32", **tiling.constants, **FUSED,
    }  # fmt: skip
    strides = (*q[0].stride(), *k[0].stride(), places.stride(0))
    bound_strides = [x.stride(0) if padded else 0 for x in bounds]
    chunk_keys = None if splits is None else -(-n_keys // splits)
    columns = (n_kv * batch, n_layers)  # the second and third axis of both grids; the first is tiles and chunks
    result = torch.empty(n_layers, batch, n_heads, n_keys, dtype=torch.float32, device=device) if out is None else out
    with current_device(device):
        chunk = tiling.chunk(columns, tiling.head_tiles * tiling.query_tiles, device, chunk_keys)
        parts = -(-n_keys // chunk)
        # maximum and sum of each row in each chunk of keys: [part (layer batch head query)]
        row_max, row_sum = torch.empty(
            2, parts, n_layers * batch * n_heads * length, dtype=torch.float32, device=device
        )
        kernel: Any = kernels.row_statistics
        kernel[(parts * tiling.head_tiles * tiling.query_tiles, *columns)](
            table, q[0], k[0], places, *bounds, row_max, row_sum, *strides, *bound_strides, n_kv, n_keys, n_layers,
            length, chunk, tiling.head_tiles, tiling.query_tiles, **constants,
        )  # fmt: skip
        if parts > 1:  # into the first part
            kernel, n_rows = kernels.merge, row_max.shape[1]
            kernel[(-(-n_rows // 64),)](
                row_max, row_sum, n_rows, parts, SPLITS=triton.next_power_of_2(parts), ROWS=64, **FUSED
            )
        chunk = tiling.chunk(columns, tiling.head_tiles, device, chunk_keys)
        kernel = kernels.weighted_sums
        kernel[(-(-n_keys // chunk) * tiling.head_tiles, *columns)](
            table, q[0], k[0], places, weight, *bounds, row_max, row_sum, result, *strides, weight.stride(0),
            *bound_strides, n_kv, n_keys, length, chunk, tiling.head_tiles, tiling.query_tiles,
            SEVERAL=tiling.query_tiles > 1, **constants,
        )  # fmt: skip
    return result


class _Tiling:
    """How the work is divided into programs."""

    def __init__(self, settings: dict[str, int], group: int, length: int, n_keys: int) -> None:
        settings = dict(settings)
        self.heads, self.queries = tile_shape(settings.pop("ROWS"), group, length)
        self.head_tiles, self.query_tiles = -(-group // self.heads), -(-length // self.queries)
        self.n_keys, self.block = n_keys, settings["N"]
        self.constants = {"HB": self.heads, "QB": self.queries, **settings}

    def chunk(self, columns: tuple[int, int], tiles: int, device: torch.device, n_keys: int | None) -> int:
        """Keys of one program, a multiple of a block: `n_keys`, or few enough to give every multiprocessor work."""
        if n_keys is not None:
            return -(-n_keys // self.block) * self.block
        blocks = -(-self.n_keys // self.block)
        # short prompts have few programs without a split of the keys; long ones fill the device anyway
        parts = min(max(PROGRAMS * _multiprocessors(device) // (columns[0] * columns[1] * tiles), 1), MOST_PARTS)
        return -(-blocks // parts) * self.block


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _equal_strides(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of all layers with one stride; copies if they differ."""
    if all(t.stride() == tensors[0].stride() for t in tensors):
        return list(tensors)
    return [t.contiguous() for t in tensors]


def _unit_last_stride(x: Tensor, device: torch.device) -> Tensor:
    x = x.to(device, torch.float32 if x.is_floating_point() else x.dtype)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _bound(
    bound: Int[Tensor, "*layer batch"] | None, default: int, batch: int, device: torch.device
) -> Int32[Tensor, "layer batch"]:
    """`[layer batch]`, with a stride of 0 where layers share it, clipped so that no key outside is read."""
    if bound is None:
        bound = torch.full((batch,), default, dtype=torch.int32, device=device)
    bound = bound.to(device, torch.int32)
    bound = bound.clamp(max=default) if default else bound.clamp(min=0)
    bound = bound.contiguous()
    return bound.as_strided((1, batch), (0, 1)) if bound.dim() == 1 else bound

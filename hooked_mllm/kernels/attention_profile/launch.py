"""Launching the Triton kernels: tiles, chunks of keys, and the table that tells them of the layers."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from hooked_mllm.kernels.attention_profile import triton as kernels
from hooked_mllm.kernels.attention_profile.naive import Streaming

#: columns of a layer's row in the table, before the words of 32 flags
FACTS = 5
#: Triton 3.9 warns where it is not told whether to fuse multiplications and additions
FUSED: dict[str, Any] = {"enable_fp_fusion": True}
LOG2_E = 1.4426950408889634
#: programs of a pass for each multiprocessor, and the most chunks that keys are cut into
PROGRAMS, MOST_PARTS = 4, 128


def settings_for(d_head: int, dtype: torch.dtype) -> dict[str, Any]:
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
) -> np.ndarray:
    """A row for each layer: where q and k lie, the scale's bits, sink, window, a flag for each head that is dense."""
    n_heads, n_keys = q[0].shape[1], k[0].shape[2]
    words = -(-n_heads // 32) if any(item is not None for item in streaming) else 0
    table = np.zeros((len(q), FACTS + words), dtype=np.int64)
    for number, item in enumerate(streaming):
        table[number, :2] = q[number].data_ptr(), k[number].data_ptr()
        if words:
            dense, sink, window = (range(n_heads), 0, 1) if item is None else item
            table[number, 3:FACTS] = min(sink, n_keys), min(window, n_keys)  # beyond all keys is beyond all keys
            for head in dense:
                table[number, FACTS + head // 32] |= 1 << head % 32
    table[:, 2] = (np.array(scale) * LOG2_E).astype(np.float32).view(np.int32)
    return table


def triton_attention_profile(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    scale: Sequence[float],
    places: Tensor,
    weight: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    streaming: Sequence[Streaming | None],
    config: dict[str, Any] | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """All layers in one launch a pass; see `attention_profile`.

    Args:
        q: Queries, as there, and the arguments that follow.
        k: Keys.
        scale: One factor for each layer.
        places: Positions of the queries.
        weight: Weights of the queries.
        start: First real keys, if any sequence is padded.
        end: Ends of the real keys.
        streaming: Kinds of heads of each layer.
        config: Tile sizes in place of `settings_for`.
        out: Contiguous memory for the result.
        splits: Into how many chunks the keys are cut, in place of what suits the device.
    """
    q, k = _alike(q), _alike(k)
    n_layers, (batch, n_heads, length, d_head), (n_kv, n_keys) = len(q), q[0].shape, k[0].shape[1:3]
    device, group, dtype = q[0].device, n_heads // n_kv, q[0].dtype
    rows = layer_table(q, k, scale, streaming)
    table = torch.from_numpy(rows).to(device, non_blocking=True)
    places, weight = (_in_rows(x, device) for x in (places, weight))
    padded = start is not None or end is not None
    bounds = [_bound(start, 0, batch, device), _bound(end, n_keys, batch, device)] if padded else [table, table]
    shared: dict[str, Any] = {
        "WORDS": rows.shape[1] - FACTS,
        "GROUP": group,
        "D": d_head,
        "BLOCK_D": max(16, triton.next_power_of_2(d_head)),
        "PADDED": padded,
        "KINDS": rows.shape[1] > FACTS,
        "ALIGNED": not bool((rows[:, :2] % 16).any()),
        "FACTS": FACTS,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        **FUSED,
    }
    strides = (*q[0].stride(), *k[0].stride(), places.stride(0))
    bound_strides = [x.stride(0) if padded else 0 for x in bounds]
    config = config or settings_for(d_head, dtype)
    cut = _Cut(config, group, length, n_keys)
    fixed = None if splits is None else -(-n_keys // splits)
    columns = (n_kv * batch, n_layers)
    result = torch.empty(n_layers, batch, n_heads, n_keys, dtype=torch.float32, device=device) if out is None else out
    with _on(device):
        chunk = cut.chunk(columns, cut.head_tiles * cut.query_tiles, device, fixed)
        parts = -(-n_keys // chunk)
        best, total = torch.empty(2, parts, n_layers * batch * n_heads * length, dtype=torch.float32, device=device)
        kernel: Any = kernels.sizes
        kernel[(parts * cut.head_tiles * cut.query_tiles, *columns)](
            table, q[0], k[0], places, *bounds, best, total, *strides, *bound_strides, n_kv, n_keys, n_layers, length,
            chunk, cut.head_tiles, cut.query_tiles, **cut.constants, **shared,
        )  # fmt: skip
        if parts > 1:
            kernel, count = kernels.merge, best.shape[1]
            kernel[(-(-count // 64),)](
                best, total, count, parts, SPLITS=triton.next_power_of_2(parts), ROWS=64, **FUSED
            )
        chunk = cut.chunk(columns, cut.head_tiles, device, fixed)
        kernel = kernels.sums
        kernel[(-(-n_keys // chunk) * cut.head_tiles, *columns)](
            table, q[0], k[0], places, weight, *bounds, best, total, result, *strides, weight.stride(0), *bound_strides,
            n_kv, n_keys, length, chunk, cut.head_tiles, cut.query_tiles, SEVERAL=cut.query_tiles > 1,
            **cut.constants, **shared,
        )  # fmt: skip
    return result


class _Cut:
    """How the work is cut into programs."""

    def __init__(self, settings: dict[str, Any], group: int, length: int, n_keys: int) -> None:
        settings = dict(settings)
        self.heads, self.queries = tile_shape(settings.pop("ROWS"), group, length)
        self.head_tiles, self.query_tiles = -(-group // self.heads), -(-length // self.queries)
        self.n_keys, self.block = n_keys, settings["N"]
        self.constants = {"HB": self.heads, "QB": self.queries, **settings}

    def chunk(self, columns: tuple[int, int], tiles: int, device: torch.device, fixed: int | None) -> int:
        """Keys of one program: as few as it takes to give every multiprocessor work, a multiple of a block."""
        blocks = -(-self.n_keys // self.block)
        if fixed is None:
            parts = min(max(PROGRAMS * _processors(device) // (columns[0] * columns[1] * tiles), 1), MOST_PARTS)
            return -(-blocks // parts) * self.block
        return -(-fixed // self.block) * self.block


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> Any:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """One stride for all layers; what comes otherwise is copied."""
    if all(t.stride() == tensors[0].stride() for t in tensors):
        return list(tensors)
    return [t.contiguous() for t in tensors]


def _in_rows(x: Tensor, device: torch.device) -> Tensor:
    x = x.to(device, torch.float32 if x.is_floating_point() else x.dtype)
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _bound(bound: Tensor | None, number: int, batch: int, device: torch.device) -> Tensor:
    """[layer batch], a stride of 0 where layers share it."""
    if bound is None:
        bound = torch.full((batch,), number, dtype=torch.int32, device=device)
    bound = bound.to(device, torch.int32)
    bound = bound.clamp(max=number) if number else bound.clamp(min=0)  # no key is read that is not there
    bound = bound.contiguous()
    return bound.as_strided((1, batch), (0, 1)) if bound.dim() == 1 else bound

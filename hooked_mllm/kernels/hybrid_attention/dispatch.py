"""Assigns heads to kernels: one launch for all, or torch's SDPA for dense heads and a launch for the others."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.kernels.hybrid_attention.naive import query_major
from hooked_mllm.kernels.hybrid_attention.plan import plan
from hooked_mllm.kernels.hybrid_attention.streaming import fits, launch_streaming
from hooked_mllm.kernels.hybrid_attention.triton import launch
from hooked_mllm.kernels.implementations import Bound, Keys, Queries

#: CUDA streams for concurrent calls of SDPA: two fill a GPU, further calls wait
SIDE_STREAMS = 4


def triton_hybrid_attention(
    q: Queries, k: Keys, v: Keys, dense: tuple[int, ...], sink: int, window: int, scale: float,
    start: Bound | None = None, end: Bound | None = None, with_lse: bool = False, sdpa: bool = False,
    config: dict[str, int] | None = None,
) -> tuple[Queries, Float[Tensor, "batch head query"] | None]:  # fmt: skip
    """Hybrid attention on a GPU; see `hybrid_attention`. `dense` is ascending, `config` replaces tile sizes.

    Groups of heads that all stream have a kernel of their own, unless dense heads need a launch too. `sdpa`: dense
    heads by torch's SDPA if there is no padding or log-sum-exp, and keys and queries are equal in number, with a last
    stride of 1.
    """
    sdpa = sdpa and start is None and not with_lse and q.shape[2] == k.shape[2] and sdpa_supports(q, k, v)
    if sdpa and len(dense) == q.shape[1]:
        return query_major(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)), None
    groups = plan(dense, q.shape[1], k.shape[1], q.device)
    # [batch head query d_head], in memory [batch query head d_head]: what the output projection reads
    z = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if with_lse else None
    dense_calls: AbstractContextManager[None] = nullcontext()
    if sdpa and groups.n_dense:
        dense_calls = dense_by_sdpa(q, k, v, z, dense, scale)
        groups = groups._replace(rows=groups.rows[groups.n_dense :], n_dense=0)
    with dense_calls:
        if groups.n_whole and not groups.n_dense and fits(q, k, v, z):
            whole = groups.rows[: groups.n_whole]
            launch_streaming(q, k, v, z, lse, whole, sink, window, scale, start, end, config)
            groups = groups._replace(rows=groups.rows[groups.n_whole :], n_whole=0)
        if len(groups.rows):
            launch(q, k, v, z, lse, groups, sink, window, scale, start, end, config)
    return z, lse


def sdpa_supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a fused SDPA kernel supports such tensors, so that no N x N mask is made; it needs a last stride of 1."""
    recent = not q.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(q.device) >= (8, 0)
    return recent and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


@contextmanager
def dense_by_sdpa(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dense: tuple[int, ...], scale: float) -> Iterator[None]:
    """Dense heads by torch's SDPA, concurrent with the kernels that are launched within the block.

    Adjacent heads of a key-value head are one call, each call has a CUDA stream: its last tiles leave the GPU idle.
    """
    size = q.shape[1] // k.shape[1]
    runs = neighbours(dense, size)
    with side_streams(q.device, len(runs)) as streams:
        for run, stream in zip(runs, streams, strict=True):
            heads, kv_head = slice(run[0], run[-1] + 1), slice(run[0] // size, run[0] // size + 1)
            with stream:
                out[:, heads] = scaled_dot_product_attention(
                    q[:, heads], k[:, kv_head], v[:, kv_head], is_causal=True, scale=scale, enable_gqa=True
                )
        yield


def neighbours(dense: tuple[int, ...], size: int) -> list[list[int]]:
    """Runs of adjacent dense heads that share a key-value head, which `size` query heads do."""
    runs: list[list[int]] = []
    for head in dense:
        if runs and runs[-1][-1] == head - 1 and head // size == runs[-1][0] // size:
            runs[-1].append(head)
        else:
            runs.append([head])
    return runs


@contextmanager
def side_streams(device: torch.device, count: int) -> Iterator[list[AbstractContextManager[object]]]:
    """`count` contexts, each of a CUDA stream that waits for the current one, which waits for them at the end."""
    if device.type != "cuda" or count == 0:
        yield [nullcontext()] * count
        return
    current = torch.cuda.current_stream(device)
    sides = _streams(device)[:count]
    before = current.record_event()
    for side in sides:
        side.wait_event(before)
    try:
        yield [torch.cuda.stream(sides[n % len(sides)]) for n in range(count)]
    finally:  # after an error too, or the streams would still use memory that is free again
        for side in sides:
            current.wait_stream(side)


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Streams with a higher priority than the default: were short tiles first, the long ones would finish alone."""
    return [torch.cuda.Stream(device, priority=-1) for _ in range(SIDE_STREAMS)]

"""Which kernel runs which heads: one launch for all, or torch's SDPA for dense heads and a launch for the rest."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.kernels.hybrid_attention.plan import plan
from hooked_mllm.kernels.hybrid_attention.streaming import fits, launch_streaming
from hooked_mllm.kernels.hybrid_attention.triton import launch

#: for calls of SDPA side by side: two fill a card, more wait their turn
SIDE_STREAMS = 4


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
    sdpa: bool = False,
    config: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hybrid attention on a GPU; see `hybrid_attention`.

    `sdpa` sends dense heads through torch's SDPA, where it can do what is asked: no padding, no log-sum-exp, as many
    keys as queries, rows of numbers side by side. Groups of heads that all stream have a kernel of their own, unless
    dense heads need a launch too.
    """
    sdpa = sdpa and start is None and not with_lse and q.shape[2] == k.shape[2] and fused(q, k, v)
    if sdpa and len(dense) == q.shape[1]:
        z = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return z.transpose(1, 2).contiguous().transpose(1, 2), None
    groups = plan(dense, q.shape[1], k.shape[1], q.device)
    # [batch query head d_head] in memory: what the output projection reads
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if with_lse else None
    beside: AbstractContextManager[Any] = nullcontext()
    if sdpa and groups.n_dense:
        beside = dense_by_sdpa(q, k, v, out, dense, scale)
        groups = groups._replace(rows=groups.rows[groups.n_dense :], n_dense=0)
    with beside:
        if groups.n_whole and not groups.n_dense and fits(q, k, v, out):
            whole = groups.rows[: groups.n_whole]
            launch_streaming(q, k, v, out, lse, whole, sink, window, scale, start, end, config)
            groups = groups._replace(rows=groups.rows[groups.n_whole :], n_whole=0)
        if len(groups.rows):
            launch(q, k, v, out, lse, groups, sink, window, scale, start, end, config)
    return out, lse


def fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether SDPA runs such tensors without a mask of N x N; its kernels want numbers of a row side by side."""
    recent = not q.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(q.device) >= (8, 0)
    return recent and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1


@contextmanager
def dense_by_sdpa(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dense: tuple[int, ...], scale: float) -> Iterator[None]:
    """Dense heads by torch's SDPA, on views, beside whatever is launched within the block.

    Neighbours that share a key-value head go in one call, and each call on a stream of its own: the last tiles of one
    head leave most of the card idle, which the next head and the streaming heads fill.
    """
    size = q.shape[1] // k.shape[1]
    runs = neighbours(dense, size)
    with side_streams(q.device, len(runs)) as streams:
        for run, stream in zip(runs, streams, strict=True):
            own, kv = slice(run[0], run[-1] + 1), slice(run[0] // size, run[0] // size + 1)
            with stream:
                out[:, own] = scaled_dot_product_attention(
                    q[:, own], k[:, kv], v[:, kv], is_causal=True, scale=scale, enable_gqa=True
                )
        yield


def neighbours(dense: tuple[int, ...], size: int) -> list[list[int]]:
    """Dense heads next to one another that share a key-value head; `size` query heads do."""
    runs: list[list[int]] = []
    for head in dense:
        if runs and runs[-1][-1] == head - 1 and head // size == runs[-1][0] // size:
            runs[-1].append(head)
        else:
            runs.append([head])
    return runs


@contextmanager
def side_streams(device: torch.device, count: int) -> Iterator[list[AbstractContextManager[Any]]]:
    """As many contexts as asked for, each on a stream that starts where the current one is.

    The current stream waits for them at the end of the block. Nowhere but on a GPU do they change anything.
    """
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
    finally:  # what fails within must not leave anything running on memory that is free again
        for side in sides:
            current.wait_stream(side)


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Ahead of the default stream: were short work first, the long work would end alone."""
    return [torch.cuda.Stream(device, priority=-1) for _ in range(SIDE_STREAMS)]

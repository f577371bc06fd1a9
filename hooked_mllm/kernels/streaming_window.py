"""Sink, window and dense heads: one check and one mask for all kernels and their callers."""

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_mllm.errors import InputError

if TYPE_CHECKING:
    #: an int of Python or NumPy
    WholeNumber = SupportsIndex
else:  # at run time any value, so that a wrong one reaches the check, whose error states what is expected
    WholeNumber = Any


def check_sink_and_window(sink: WholeNumber, window: WholeNumber, window_name: str = "window") -> tuple[int, int]:
    """Sink (0 or more) and window (1 or more) of streaming heads, as plain ints; `window_name` is for the error."""
    sizes = _as_int(sink), _as_int(window)
    if sizes[0] is None or sizes[1] is None or sizes[0] < 0 or sizes[1] < 1:
        raise InputError(
            f"Expected whole numbers sink >= 0 and {window_name} >= 1; got sink={sink!r}, {window_name}={window!r}."
        )
    return sizes[0], sizes[1]


def _as_int(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):  # not converted: under torch.compile it may be symbolic
        return value
    return int(value) if isinstance(value, Integral) else None


def head_flags(heads: Iterable[int], n_heads: int, device: torch.device | str = "cpu") -> Bool[Tensor, " head"]:
    """A mask of one layer's heads, True at `heads`."""
    flags = torch.zeros(n_heads, dtype=torch.bool)
    flags[[*heads]] = True
    return flags.to(device)


def visible_keys_at(
    positions: Int[Tensor, "#batch query"], n_keys: int, dense: Bool[Tensor, " head"], sink: int, window: int,
    start: Int[Tensor, " batch"], end: Int[Tensor, " batch"],
) -> Bool[Tensor, "batch head query key"]:  # fmt: skip
    """The keys that each query of each head sees.

    A query at position p sees key j iff `start <= j < end`, `j <= p`, and, unless the head is dense,
    `j < start + sink` or `j > p - window`.

    `positions` has one row for all sequences or one for each; `start` and `end` bound the real keys of each sequence.
    """
    device = positions.device
    key = torch.arange(n_keys, device=device)
    position = rearrange(positions, "batch query -> batch 1 query 1")
    first, last = (rearrange(bound.to(device), "batch -> batch 1 1 1") for bound in (start, end))
    causal = (key <= position) & (key >= first) & (key < last)  # [batch 1 query key]
    near = (key > position - window) | (key < first + sink)
    return causal & (near | rearrange(dense.to(device), "head -> head 1 1"))

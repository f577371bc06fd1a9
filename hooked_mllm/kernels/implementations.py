"""The choice between a Triton kernel and its definition in torch, and what the kernels support."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.errors import HookValueError

#: inputs of the kernels: queries, keys or values, flags of heads, and first or last real keys of sequences
Queries = Float[Tensor, "batch head query d_head"]
Keys = Float[Tensor, "batch kv_head key d_head"]
HeadFlags = Bool[Tensor, " head"]
Bound = Int[Tensor, " batch"]

IMPLEMENTATIONS = ("auto", "triton", "naive")
if TYPE_CHECKING:
    #: a Triton kernel where it can run, always, or never
    Implementation = Literal["auto", "triton", "naive"]
else:  # at run time a plain string, so that another one reaches the check whose error lists the choices
    Implementation = str

HEAD_DIMS = (16, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed; some builds of torch come without it."""
    return find_spec("triton") is not None


def kernel_fits(d_head: int, dtype: torch.dtype) -> bool:
    """Whether Triton is installed and the kernels support heads of this width and dtype."""
    return has_triton() and supported(d_head, dtype)


def kernel_runs(device: torch.device) -> bool:
    """Whether kernels can run there: on a GPU, or anywhere under Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def supported(d_head: int, dtype: torch.dtype) -> bool:
    """Whether the kernels support heads of this width and dtype."""
    return HEAD_DIMS[0] <= d_head <= HEAD_DIMS[1] and dtype in DTYPES


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the current one within it: Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_implementation(implementation: Implementation) -> None:
    """Check the name of an implementation."""
    if implementation not in IMPLEMENTATIONS:
        raise HookValueError(f"implementation is one of {IMPLEMENTATIONS}; got {implementation!r}.")


def check_triton(q: Tensor, fits: bool, runs: bool) -> None:
    """Check that the kernels support queries like these (`fits`) and run on their device (`runs`)."""
    if not fits:
        raise HookValueError(
            f"The Triton kernels support head dims {HEAD_DIMS[0]} to {HEAD_DIMS[1]} in bfloat16, float16 or float32; "
            f"got {q.shape[-1]} in {q.dtype}{'' if has_triton() else ', and Triton is not installed'}. "
            "implementation='naive' supports any."
        )
    if not runs:
        raise HookValueError(
            f"The Triton kernels run on a GPU; q is on {q.device}. implementation='naive' runs anywhere."
        )

"""Head-level hybrid attention: some heads dense, the others streaming; see README.md."""

from importlib import import_module
from typing import Any

from hooked_mllm.kernels.hybrid_attention.mask_types import HeadPattern as HeadPattern
from hooked_mllm.kernels.hybrid_attention.mask_types import pattern_from_mask_types as pattern_from_mask_types
from hooked_mllm.kernels.hybrid_attention.naive import naive_hybrid_attention as naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.naive import visible_keys as visible_keys
from hooked_mllm.kernels.hybrid_attention.op import hybrid_attention as hybrid_attention


def __getattr__(name: str) -> Any:
    """`heads_from_gates` of `hooked_mllm.heads`, under its earlier address."""
    if name == "heads_from_gates":
        return import_module("hooked_mllm.heads").heads_from_gates
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

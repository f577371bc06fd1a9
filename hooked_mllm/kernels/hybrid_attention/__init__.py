"""Head-level hybrid attention: some heads dense, the others streaming; see README.md."""

from typing import Any

from hooked_mllm.exports import moved_name
from hooked_mllm.kernels.hybrid_attention.mask_types import HeadPattern as HeadPattern
from hooked_mllm.kernels.hybrid_attention.mask_types import pattern_from_mask_types as pattern_from_mask_types
from hooked_mllm.kernels.hybrid_attention.naive import naive_hybrid_attention as naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.naive import visible_keys as visible_keys
from hooked_mllm.kernels.hybrid_attention.op import hybrid_attention as hybrid_attention


def __getattr__(name: str) -> Any:
    """`heads_from_gates`, which is in `hooked_mllm.heads` now."""
    return moved_name(__name__, name)

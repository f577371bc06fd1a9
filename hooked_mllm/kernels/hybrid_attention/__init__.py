"""Head-level hybrid attention: some heads dense, the others streaming; see README.md beside this file."""

from hooked_mllm.kernels.hybrid_attention.encodings import HeadPattern as HeadPattern
from hooked_mllm.kernels.hybrid_attention.encodings import heads_from_gates as heads_from_gates
from hooked_mllm.kernels.hybrid_attention.encodings import pattern_from_mask_types as pattern_from_mask_types
from hooked_mllm.kernels.hybrid_attention.naive import naive_hybrid_attention as naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.naive import visible_keys as visible_keys
from hooked_mllm.kernels.hybrid_attention.op import hybrid_attention as hybrid_attention

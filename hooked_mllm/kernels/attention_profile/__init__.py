"""The mean attention row of selected queries of long prompts, without the N x N rows in memory; see README.md."""

from hooked_mllm.kernels.attention_profile.naive import naive_attention_profile as naive_attention_profile
from hooked_mllm.kernels.attention_profile.naive import seen_keys as seen_keys
from hooked_mllm.kernels.attention_profile.op import Streaming as Streaming
from hooked_mllm.kernels.attention_profile.op import attention_profile as attention_profile
from hooked_mllm.kernels.implementations import has_triton as has_triton
from hooked_mllm.kernels.implementations import kernel_fits as kernel_fits
from hooked_mllm.kernels.implementations import kernel_runs as kernel_runs

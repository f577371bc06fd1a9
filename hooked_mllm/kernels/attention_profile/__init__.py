"""Scores over long prompts: the mean attention row of chosen queries without the rows; see README.md beside this."""

from hooked_mllm.kernels.attention_profile.naive import naive_attention_profile as naive_attention_profile
from hooked_mllm.kernels.attention_profile.naive import seen_keys as seen_keys
from hooked_mllm.kernels.attention_profile.op import Streaming as Streaming
from hooked_mllm.kernels.attention_profile.op import attention_profile as attention_profile
from hooked_mllm.kernels.attention_profile.op import has_triton as has_triton
from hooked_mllm.kernels.attention_profile.op import kernel_fits as kernel_fits
from hooked_mllm.kernels.attention_profile.op import kernel_runs as kernel_runs

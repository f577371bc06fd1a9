"""The maths of the metrics as plain functions on attention tensors, with shapes checked at every call."""

from hooked_mllm.metrics.functional.key_tokens import key_token_coverage as key_token_coverage
from hooked_mllm.metrics.functional.key_tokens import key_token_ratio as key_token_ratio
from hooked_mllm.metrics.functional.key_tokens import key_tokens as key_tokens
from hooked_mllm.metrics.functional.mass import attention_mass as attention_mass
from hooked_mllm.metrics.functional.mass import attention_profile as attention_profile

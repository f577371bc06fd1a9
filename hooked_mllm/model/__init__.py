"""HookedMLLM, and the groups of methods it is made of."""

from hooked_mllm.model.hooked_mllm import HookedMLLM as HookedMLLM

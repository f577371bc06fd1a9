"""Caches of activations: by name, lazy where that saves memory, with the tools of the residual stream."""

from hooked_mllm.cache.activation_cache import ActivationCache as ActivationCache
from hooked_mllm.cache.generation import GenerationCache as GenerationCache

"""Joins hook points to the modules of a transformers model, by what its family says of itself."""

from hooked_mllm.wiring.blocks import head_results as head_results
from hooked_mllm.wiring.model import Wiring as Wiring
from hooked_mllm.wiring.model import wire as wire

"""Wiring: binds hook points to the modules of a transformers model, by the table of hook points and the family."""

from hooked_mllm.wiring.model import Wiring as Wiring
from hooked_mllm.wiring.model import wire as wire
from hooked_mllm.wiring.results import head_results as head_results

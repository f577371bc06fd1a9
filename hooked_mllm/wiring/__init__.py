"""Wiring: binds hook points to the modules of a transformers model, by the table of hook points and the model's family.

`wire` makes all of a model; `module_sides` are the activations that modules take or return, `computed` those that none
does.
"""

from hooked_mllm.wiring.model import Wiring as Wiring
from hooked_mllm.wiring.model import wire as wire
from hooked_mllm.wiring.results import head_results as head_results

__all__ = ["Wiring", "head_results", "wire"]

"""The engine under causal metrics: many variants of one run, each taken up where it first differs, in batches."""

from hooked_mllm.sweep.engine import Sweep as Sweep
from hooked_mllm.sweep.trunk import Trunk as Trunk

"""Many variants of one run, in batches, each computed from the first block that it changes."""

from hooked_mllm.sweep.engine import Sweep as Sweep
from hooked_mllm.sweep.trunk import Trunk as Trunk

"""Benchmarks of this package, and what they use to run a model with its blocks compiled."""

from hooked_mllm.bench.compiled import CompiledBlocks as CompiledBlocks
from hooked_mllm.bench.compiled import compile_blocks as compile_blocks
from hooked_mllm.bench.configs import SIZES as SIZES
from hooked_mllm.bench.configs import TextSize as TextSize
from hooked_mllm.bench.configs import random_text_model as random_text_model
from hooked_mllm.bench.kernel import bench_kernel as bench_kernel
from hooked_mllm.bench.prefill import bench_prefill as bench_prefill
from hooked_mllm.bench.prefill import choose_heads as choose_heads
from hooked_mllm.bench.record import PrefillRecord as PrefillRecord
from hooked_mllm.bench.variants import Variant as Variant
from hooked_mllm.bench.variants import prefill_variants as prefill_variants

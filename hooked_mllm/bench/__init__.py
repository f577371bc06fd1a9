"""Benchmarks of prefill and of the attention kernel, and models with compiled blocks."""

from typing import TYPE_CHECKING

from hooked_mllm.exports import lazy_exports

if TYPE_CHECKING:
    from hooked_mllm.bench.choices import SIZES as SIZES
    from hooked_mllm.bench.choices import TextSize as TextSize
    from hooked_mllm.bench.compiled import CompiledBlocks as CompiledBlocks
    from hooked_mllm.bench.compiled import compile_blocks as compile_blocks
    from hooked_mllm.bench.configs import random_text_model as random_text_model
    from hooked_mllm.bench.kernel import bench_kernel as bench_kernel
    from hooked_mllm.bench.prefill import bench_prefill as bench_prefill
    from hooked_mllm.bench.prefill import choose_heads as choose_heads
    from hooked_mllm.bench.record import PrefillRecord as PrefillRecord
    from hooked_mllm.bench.variants import Variant as Variant
    from hooked_mllm.bench.variants import prefill_variants as prefill_variants
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "choices": "SIZES TextSize",
            "compiled": "CompiledBlocks compile_blocks",
            "configs": "random_text_model",
            "kernel": "bench_kernel",
            "prefill": "bench_prefill choose_heads",
            "record": "PrefillRecord",
            "variants": "Variant prefill_variants",
        },
    )

"""Shared by the benchmarks: large random models, samples of a given length, interleaved timing, tables."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from hooked_mllm import Box, Sample, TokenLayout, metrics
from hooked_mllm.families import family_of
from hooked_mllm.layout import ImageMedia

#: sizes of Qwen3-VL-8B-Instruct; weights are random, which does not change the times
QWEN3_VL_8B = {
    "text": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    },
    "vision": {
        "depth": 27,
        "hidden_size": 1152,
        "num_heads": 16,
        "intermediate_size": 4304,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
#: sizes of Qwen3-VL-32B-Instruct
QWEN3_VL_32B = {
    "text": {
        **QWEN3_VL_8B["text"],
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
    "vision": {**QWEN3_VL_8B["vision"], "out_hidden_size": 5120},
}
#: the same structure in miniature, to try a benchmark on a CPU
TINY = {
    "text": {
        **QWEN3_VL_8B["text"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {**QWEN3_VL_8B["text"]["rope_parameters"], "mrope_section": [4, 2, 2]},
    },
    "vision": {
        **QWEN3_VL_8B["vision"],
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    },
}


def random_model(
    size: dict[str, Any], device: str, dtype: torch.dtype, attention: str = "sdpa"
) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL of a given size with random weights, which are initialized on the device."""
    config = Qwen3VLConfig(
        text_config=size["text"], vision_config=size["vision"], initializer_range=0.02, tie_word_embeddings=False
    )
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def make_sample(
    model: Qwen3VLForConditionalGeneration, n_tokens: int, n_question: int, grid: int, seed: int = 0
) -> Sample:
    """A sample of exactly `n_tokens`: an image of `grid` x `grid` visual tokens, filler text, a question at the end."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    visual = grid * grid
    tokens = torch.randint(1000, 100_000, (n_tokens,), generator=generator)
    tokens[4] = config.vision_start_token_id
    tokens[5 : 5 + visual] = config.image_token_id
    tokens[5 + visual] = config.vision_end_token_id
    patches = (2 * grid) ** 2  # merged 2 x 2
    width = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    inputs = {
        "input_ids": tokens[None],
        "attention_mask": torch.ones(1, n_tokens, dtype=torch.long),
        "mm_token_type_ids": (tokens == config.image_token_id).long()[None],
        "pixel_values": torch.randn(patches, width, generator=generator).to(model.dtype),
        "image_grid_thw": torch.tensor([[1, 2 * grid, 2 * grid]]),
    }
    family = family_of(config)
    side = 32 * grid
    items = family.visual_items(config, SimpleNamespace(), inputs, (ImageMedia(side, side),))
    end = n_tokens - 2
    layout = TokenLayout.build(tokens, items, family.visual_token_ids(config), {"question": [(end - n_question, end)]})
    box = Box(0, 0, side // 4, side // 4)
    return Sample(inputs, layout, question="", target=box, target_mask=layout.target(box)).to(model.device)


def demand(condition: bool, what: str) -> None:
    """End the benchmark if results differ."""
    if not condition:
        sys.exit(f"results differ, so nothing is timed: {what}")


def three_metrics() -> list[metrics.HeadMetric]:
    """New instances of the metrics that are timed together."""
    return [metrics.RetrievalAttentionMass(), metrics.KeyTokenRatio(), metrics.VisionMass()]


def synchronise(device: str) -> None:
    """Wait for all work on the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass
class Timing:
    """Milliseconds of one variant in every round, and its peak memory."""

    ms: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    failed: str | None = None

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.ms) if self.ms else float("nan")


def interleaved(
    variants: dict[str, Callable[[], Any]], repeats: dict[str, int] | int, rounds: int, device: str, warm_up: int = 2
) -> dict[str, Timing]:
    """Time variants in turn, round after round, so that drift of the machine affects all of them equally.

    Args:
        variants: The functions to time, by name; each call is one unit of work.
        repeats: Calls between two clock readings.
        rounds: Readings of each variant.
        device: "cuda" or "cpu".
        warm_up: Calls before the call that measures memory, none of which are timed.

    Returns:
        Milliseconds per call, and the peak of memory during a call minus the memory allocated before it. A variant that
        runs out of memory is recorded as failed and left out of later rounds.
    """
    timings = {name: Timing() for name in variants}
    cuda = device.startswith("cuda")

    def clock(fn: Callable[[], Any], n: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(n):
            fn()
        synchronise(device)
        return (time.perf_counter() - start) / n * 1e3

    for name, fn in variants.items():
        try:
            if warm_up:
                clock(fn, warm_up)
            if cuda:
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                clock(fn, 1)
                timings[name].peak_gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        except torch.cuda.OutOfMemoryError:
            timings[name].failed = "out of memory"
            torch.cuda.empty_cache()
    for _ in range(rounds):
        for name, fn in variants.items():
            if timings[name].failed is None:
                n = repeats if isinstance(repeats, int) else repeats[name]
                timings[name].ms.append(clock(fn, n))
    return timings


def report(title: str, timings: dict[str, Timing], bases: dict[str, str]) -> str:
    """A table of medians, ratios to a base (the median over rounds of the ratio within a round), spread and memory."""
    lines = [title, f"{'variant':<44}{'ms':>10}{'ratio':>9}{'spread':>16}{'peak GiB':>10}  against"]
    for name, timing in timings.items():
        if timing.failed:
            lines.append(f"{name:<44}{timing.failed:>35}")
            continue
        base = timings[bases[name]]
        ratios = sorted(a / b for a, b in zip(timing.ms, base.ms, strict=True))
        spread = f"{ratios[0]:.3f}-{ratios[-1]:.3f}"
        lines.append(
            f"{name:<44}{timing.median:>10.2f}{statistics.median(ratios):>9.3f}{spread:>16}{timing.peak_gib:>10.2f}  "
            f"{bases[name]}"
        )
    return "\n".join(lines)


def as_json(timings: dict[str, Timing]) -> str:
    """The raw numbers."""
    return json.dumps({name: vars(t) for name, t in timings.items()})

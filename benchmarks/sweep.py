"""The cost of ablating every head separately: the sweep engine against a plain loop of forward passes with a hook.

Run on a GPU:  python benchmarks/sweep.py
On a CPU:      python benchmarks/sweep.py --tiny

Both are timed in one process. Values are compared first: in float32 they must agree up to rounding before anything is
timed, and in the timed dtype within a fifth of their standard deviation over heads, or no ratio is printed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from common import QWEN3_VL_8B, TINY, make_sample, random_model, synchronise
from torch import Tensor
from transformers import PreTrainedModel

from hooked_mllm import HeadAblation, HookedMLLM, Sample, objectives
from hooked_mllm.storage import ready, write_text
from hooked_mllm.sweep import Sweep

Heads = list[tuple[int, int]]
Result = TypeVar("Result")
TOKENS = (1000, 2000)


def objective() -> objectives.LogitDifference:
    """The difference of two logits at the last position: random weights have no answer."""
    return objectives.LogitDifference(TOKENS[0], wrong=TOKENS[1])


def ablations(heads: Heads, first: int) -> list[HeadAblation]:
    """For each head, an ablation that sets its z to zero from a position on."""
    positions = None if first == 0 else slice(first, None)
    return [HeadAblation([head], mode="zero", phase="prefill", positions=positions) for head in heads]


def loop(hf: PreTrainedModel, inputs: dict[str, Tensor], heads: Heads, first: int = 0, **options: Any) -> Tensor:
    """The plain loop: one forward pass of the transformers model for each head, with a bare torch hook."""
    config, layers, values = hf.config.text_config, hf.model.language_model.layers, []
    width = config.head_dim
    for layer, head in heads:

        def ablate(_: Any, args: tuple[Tensor], head: int = head) -> tuple[Tensor]:
            z = args[0].clone()  # [batch pos (head d_head)]
            z[:, first:, head * width : (head + 1) * width] = 0
            return (z,)

        handle = layers[layer].self_attn.o_proj.register_forward_pre_hook(ablate)
        logits = hf(**inputs, use_cache=False, **options).logits[0, -1].float()
        handle.remove()
        values.append(logits[TOKENS[0]] - logits[TOKENS[1]])
    return torch.stack(values).double().cpu()


def seconds(fn: Callable[[], Result], device: str) -> tuple[float, Result]:
    """Wall-clock seconds of a call, and its result."""
    synchronise(device)
    start = time.perf_counter()
    result = fn()
    synchronise(device)
    return time.perf_counter() - start, result


def check(model: HookedMLLM, sample: Sample, heads: Heads, first: int, what: str) -> None:
    """Compare the engine's values with the loop's, in float32."""
    swept = Sweep(model, sample, objective()).run(ablations(heads, first))[:, 0]
    looped = loop(model.hf_model, sample.inputs, heads, first)
    error, size = (swept - looped).abs().max().item(), looped.abs().max().item()
    print(f"float32, {len(heads)} heads, {what}: largest difference {error:.2e} at values up to {size:.2e}")
    if not error <= 2e-4 * size:
        sys.exit("results differ, so nothing is timed")


@dataclass
class Benchmark:
    """The model, the sample and the heads that are timed, and the facts of the last sweep."""

    model: HookedMLLM
    sample: Sample
    heads: Heads
    device: str
    batch_size: int | None
    rounds: int
    facts: dict[str, Any] = field(default_factory=dict)

    def sweep(self, first: int, compiled: bool) -> Tensor:
        """One sweep over all heads; its batch size and peak memory become the facts."""
        cuda = self.device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        engine = Sweep(self.model, self.sample, objective(), batch_size=self.batch_size, compile=compiled)
        values = engine.run(ablations(self.heads, first))[:, 0]
        self.facts = {"batch": engine.batch.now, "shrunk": engine.batch.shrunk}
        if cuda:
            self.facts["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
        return values

    def run(self) -> dict[str, Any]:
        """Time the loop and every case, print them, and return the raw numbers."""
        hf, inputs, heads = self.model.hf_model, self.sample.inputs, self.heads
        n_tokens, few = len(self.sample), few_heads(heads)
        scale = len(heads) / len(few)
        loop(hf, inputs, heads[:4])  # warm-up
        plain, looped = seconds(lambda: loop(hf, inputs, heads), self.device)
        last_logits = seconds(lambda: loop(hf, inputs, few, logits_to_keep=1), self.device)[0] * scale
        print(f"plain loop: {plain:.2f} s, {plain / len(heads) * 1e3:.1f} ms per head")
        print(f"the loop with logits of the last position only: {last_logits:.2f} s (from {len(few)} heads)")
        raw: dict[str, Any] = {"plain_s": plain, "careful_s": last_logits, "tokens": n_tokens}
        cases = {"every position": 0, "from the question on": n_tokens - 66, "the last position": n_tokens - 1}
        for compiled in (False, True) if self.device == "cuda" else (False,):
            for name, first in cases.items():
                if compiled and first:
                    continue  # partial sequences are not compiled
                loop_s = plain
                if first:
                    loop_s = seconds(lambda first=first: loop(hf, inputs, few, first), self.device)[0] * scale
                title = name + (", compiled" if compiled else "")
                raw[title] = self.case(title, first, compiled, loop_s, looped)
        return raw

    def case(self, title: str, first: int, compiled: bool, loop_s: float, looped: Tensor) -> dict[str, Any]:
        """Time the sweep from one position on, against the seconds of the loop; `looped` are values of `first=0`."""
        self.sweep(first, compiled)  # warm-up
        runs = [seconds(lambda: self.sweep(first, compiled), self.device) for _ in range(self.rounds)]
        if first == 0:
            error = (runs[0][1] - looped).abs()
            print(
                f"{self.model.dtype}, {title}: values {looped.mean():.3g} +- {looped.std():.3g}; the engine differs by "
                f"{error.mean():.2g} on average, {error.max():.2g} at most"
            )
            if not error.mean() < 0.2 * looped.std():
                sys.exit("results differ, so no ratio is printed")
        times = [took for took, _ in runs]
        median = statistics.median(times)
        print(
            f"sweep, {title}: {median:.2f} s ({min(times):.2f}-{max(times):.2f}), "
            f"{median / len(self.heads) * 1e3:.2f} ms per head; {loop_s / median:.2f} times as fast as the loop "
            f"({loop_s:.2f} s); {self.facts}"
        )
        return {"s": times, "loop_s": loop_s, **self.facts}


def few_heads(heads: Heads) -> Heads:
    """About 24 heads, spread evenly."""
    return heads[:: max(1, len(heads) // 24)]


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a miniature on the CPU, to try the script")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="timed sweeps; the loop runs once in full")
    parser.add_argument("--batch-size", type=int, help="variants in a batch, in place of the engine's choice")
    parser.add_argument("--out", type=Path, help="a JSON file for the raw numbers")
    arguments = parser.parse_args()
    if arguments.out:
        ready(arguments.out)
    device = "cpu" if arguments.tiny else "cuda"
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    hf = random_model(TINY if arguments.tiny else QWEN3_VL_8B, device, torch.float32)
    model = HookedMLLM.from_model(hf)
    heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    sample = make_sample(hf, arguments.tokens, 64, grid=16)
    check(model, sample, few_heads(heads), 0, "every position ablated")
    check(model, sample, few_heads(heads), arguments.tokens - 66, "the question's positions ablated")
    if not arguments.tiny:
        hf.to(torch.bfloat16)
        torch.cuda.empty_cache()
    sample = make_sample(hf, arguments.tokens, 64, grid=16)
    title = "CPU miniature" if arguments.tiny else f"{torch.cuda.get_device_name()}, Qwen3-VL-8B, random weights"
    print(f"{title}, {hf.dtype}, {arguments.tokens} tokens, {len(heads)} heads; torch {torch.__version__}")
    raw = Benchmark(model, sample, heads, device, arguments.batch_size, arguments.rounds).run()
    if arguments.out:
        write_text(arguments.out, json.dumps(raw))


if __name__ == "__main__":
    main()

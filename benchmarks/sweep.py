"""What ablating every head alone costs: the sweep engine against a plain loop of forward passes with a hook.

Run on a GPU:  python benchmarks/sweep.py
On a CPU:      python benchmarks/sweep.py --tiny

Both are timed in one process. Values are compared first: in float32 they must agree to rounding before anything is
timed, and in the dtype that is timed to a fifth of their spread over heads, or no ratio is printed.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import QWEN3_VL_8B, TINY, make_sample, random_model

from hooked_mllm import HeadAblation, HookedMLLM, objectives
from hooked_mllm.storage import ready, write_text
from hooked_mllm.sweep import Sweep

TOKENS = (1000, 2000)


def objective() -> Any:
    """The difference of two logits at the last position: random weights have no answer."""
    return objectives.LogitDifference(TOKENS[0], wrong=TOKENS[1])


def ablations(heads: list[tuple[int, int]], positions: Any = None) -> list[Any]:
    """Each head alone, its z zero."""
    return [HeadAblation([head], mode="zero", phase="prefill", positions=positions) for head in heads]


def loop(hf: Any, inputs: dict[str, Any], heads: list[tuple[int, int]], first: int = 0, **options: Any) -> torch.Tensor:
    """The plain loop: one forward pass a head of the transformers model, with a bare torch hook."""
    config, layers, values = hf.config.text_config, hf.model.language_model.layers, []
    width = config.head_dim
    for layer, head in heads:

        def silence(_: Any, args: tuple[torch.Tensor], head: int = head) -> tuple[torch.Tensor]:
            z = args[0].clone()
            z[:, first:, head * width : (head + 1) * width] = 0
            return (z,)

        handle = layers[layer].self_attn.o_proj.register_forward_pre_hook(silence)
        logits = hf(**inputs, use_cache=False, **options).logits[0, -1].float()
        handle.remove()
        values.append(logits[TOKENS[0]] - logits[TOKENS[1]])
    return torch.stack(values).double().cpu()


def seconds(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of a call, and what it gave."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = fn()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def check(model: HookedMLLM, sample: Any, heads: list[tuple[int, int]], first: int, what: str) -> None:
    """The engine's values against the loop's, in float32."""
    positions = None if first == 0 else slice(first, None)
    swept = Sweep(model, sample, objective()).run(ablations(heads, positions))[:, 0]
    looped = loop(model.hf_model, sample.inputs, heads, first)
    error, size = (swept - looped).abs().max().item(), looped.abs().max().item()
    print(f"float32, {len(heads)} heads, {what}: largest difference {error:.2e} at values up to {size:.2e}")
    if not error <= 2e-4 * size:
        sys.exit("results differ, so nothing is timed")


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a miniature on the CPU, to try the script")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="sweeps that are timed; the loop runs once in full")
    parser.add_argument("--batch-size", type=int, help="variants in a batch, instead of the engine's own choice")
    parser.add_argument("--out", type=Path, help="a JSON file for the raw numbers")
    arguments = parser.parse_args()
    if arguments.out:
        ready(arguments.out)
    device = "cpu" if arguments.tiny else "cuda"
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    hf = random_model(TINY if arguments.tiny else QWEN3_VL_8B, device, torch.float32)
    model = HookedMLLM.from_model(hf)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    question = arguments.tokens - 66
    few = heads[:: max(1, len(heads) // 24)]
    sample = make_sample(hf, arguments.tokens, 64, grid=16)
    check(model, sample, few, 0, "every position ablated")
    check(model, sample, few, question, "the question's positions ablated")
    if not arguments.tiny:
        hf.to(torch.bfloat16)
        torch.cuda.empty_cache()
    sample = make_sample(hf, arguments.tokens, 64, grid=16)
    inputs = sample.inputs
    title = "CPU miniature" if arguments.tiny else f"{torch.cuda.get_device_name()}, Qwen3-VL-8B, random weights"
    print(f"{title}, {hf.dtype}, {arguments.tokens} tokens, {len(heads)} heads; torch {torch.__version__}")

    loop(hf, inputs, heads[:4])
    facts: dict[str, Any] = {}

    def sweep(first: int | None, compiled: bool) -> torch.Tensor:
        cuda = device == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        engine = Sweep(model, sample, objective(), batch_size=arguments.batch_size, compile=compiled)
        values = engine.run(ablations(heads, None if first == 0 else slice(first, None)))[:, 0]
        facts.update(batch=engine.batch.now, shrunk=engine.batch.shrunk)
        if cuda:
            facts["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
        return values

    plain, looped = seconds(lambda: loop(hf, inputs, heads))
    share = len(heads) / len(few)
    careful = seconds(lambda: loop(hf, inputs, few, logits_to_keep=1))[0] * share
    print(f"plain loop: {plain:.2f} s, {plain / len(heads) * 1e3:.1f} ms a head")
    print(f"the loop, computing logits of the last position alone: {careful:.2f} s (from {len(few)} heads)")
    raw: dict[str, Any] = {"plain_s": plain, "careful_s": careful, "tokens": arguments.tokens}
    cases = {"every position": 0, "the question and behind": question, "the last position": arguments.tokens - 1}
    for compiled in (False, True) if device == "cuda" else (False,):
        for what, first in cases.items():
            if compiled and first:
                continue  # the end of a sequence alone is not compiled
            sweep(first, compiled)
            base = plain if first == 0 else seconds(lambda first=first: loop(hf, inputs, few, first))[0] * share
            runs = [
                seconds(lambda first=first, compiled=compiled: sweep(first, compiled)) for _ in range(arguments.rounds)
            ]
            times = [took for took, _ in runs]
            name = what + (", compiled" if compiled else "")
            if first == 0:
                error = (runs[0][1] - looped).abs()
                print(
                    f"{hf.dtype}, {name}: values {looped.mean():.3g} +- {looped.std():.3g}; the engine differs by "
                    f"{error.mean():.2g} in the mean, {error.max():.2g} at most"
                )
                if not error.mean() < 0.2 * looped.std():
                    sys.exit("results differ, so no ratio is printed")
            took = statistics.median(times)
            print(
                f"sweep, {name}: {took:.2f} s ({min(times):.2f}-{max(times):.2f}), {took / len(heads) * 1e3:.2f} ms a "
                f"head; {base / took:.2f} times as fast as the loop ({base:.2f} s); {facts}"
            )
            raw[name] = {"s": times, "loop_s": base, **facts}
    if arguments.out:
        write_text(arguments.out, json.dumps(raw))


if __name__ == "__main__":
    main()

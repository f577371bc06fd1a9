"""The cost of hooks and caches in a generation, relative to `hf_model.generate` in the same run.

Run on a GPU:  python benchmarks/generate.py
On a CPU:      python benchmarks/generate.py --tiny

Variants take turns in one process. Tokens, and the cached activations of every step, are compared before anything is
timed; if they differ, only the difference is printed.
"""

import argparse
import cProfile
import os
import pstats
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import QWEN3_VL_8B, TINY, as_json, demand, interleaved, make_sample, random_model, report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hooked_mllm import HookedMLLM, Sample
from hooked_mllm.storage import ready_folder, write_text

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it products on a GPU may differ from call to call
CACHED = ["blocks.*.attn.hook_z", "blocks.*.hook_resid_post"]


def read_only(z: Tensor, hook: Any) -> None:
    """A hook of a user that looks at z."""


def witnessed(model: HookedMLLM, sample: Sample, options: dict[str, Any]) -> tuple[Tensor, list[list[Tensor]]]:
    """The tokens of plain transformers, and z of every call of each layer by bare torch hooks."""
    calls: list[list[Tensor]] = [[] for _ in model.hf_model.model.language_model.layers]
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        for layer, kept in zip(model.hf_model.model.language_model.layers, calls, strict=True)
    ]
    try:
        return model.hf_model.generate(**sample.inputs, **options), calls
    finally:
        for handle in handles:
            handle.remove()


def check(model: HookedMLLM, sample: Sample, options: dict[str, Any]) -> None:
    """Compare tokens and cached z with those of plain transformers, in torch's deterministic mode.

    Where plain transformers does not repeat itself even there, what it differs by is the bound, of the prompt's z.
    """
    tokens, calls = witnessed(model, sample, options)
    again, repeated = witnessed(model, sample, options)
    repeats = torch.equal(tokens, again)
    if not repeats:
        print("two plain generations differ in their tokens: only z of the prompt is compared")
        calls, repeated = [kept[:1] for kept in calls], [kept[:1] for kept in repeated]
    noise = max(max(map(largest_difference, a, b)) for a, b in zip(calls, repeated, strict=True))
    hooked = model.generate(sample, **options)
    with model.hooks([("blocks.*.attn.hook_z", read_only)]):
        read = model.generate(sample, **options)
    cached, cache = model.run_with_cache(sample, CACHED, generate=options)
    for name, result in (("without hooks", hooked), ("with a hook", read), ("with a cache", cached)):
        demand(not repeats or torch.equal(tokens, result), f"tokens {name}")
    for layer, kept in enumerate(calls):
        z = torch.cat(kept, dim=1)
        error = largest_difference(cache["z", layer].flatten(2)[:, : z.shape[1]], z)
        demand(error <= 2 * noise, f"z of layer {layer} by {error:.2g}, plain ones by {noise:.2g}")


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors."""
    return (a.float() - b.float()).abs().max().item()


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a miniature on the CPU, to try the script")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="print where Python spends its time")
    parser.add_argument("--out", type=Path, help="folder for the raw numbers")
    arguments = parser.parse_args()
    device = "cpu" if arguments.tiny else "cuda"
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    size, dtype = (TINY, torch.float32) if arguments.tiny else (QWEN3_VL_8B, torch.bfloat16)
    model = HookedMLLM.from_model(random_model(size, device, dtype))
    sample = make_sample(model.hf_model, arguments.tokens, 64, grid=16)
    options = {"max_new_tokens": arguments.new, "min_new_tokens": arguments.new, "do_sample": False}
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        check(model, sample, options)
    torch.use_deterministic_algorithms(False)

    def hooked() -> Any:
        with model.hooks([("blocks.*.attn.hook_z", read_only)]):
            return model.generate(sample, **options)

    plain = "hf_model.generate"
    variants: dict[str, Callable[[], Any]] = {
        plain: lambda: model.hf_model.generate(**sample.inputs, **options),
        "no hooks": lambda: model.generate(sample, **options),
        "a z hook in every layer": hooked,
        "z and residuals of all steps cached": lambda: model.run_with_cache(sample, CACHED, generate=options),
    }
    timings = interleaved(variants, 1, arguments.rounds, device)
    name = "CPU miniature" if arguments.tiny else f"{torch.cuda.get_device_name()}, Qwen3-VL-8B, bfloat16"
    title = f"{name}; torch {torch.__version__}; {arguments.tokens} tokens and {arguments.new} new ones"
    print(report(title, timings, dict.fromkeys(variants, plain)), flush=True)
    if arguments.out:
        ready_folder(arguments.out)
        write_text(arguments.out / "generate.json", as_json(timings))
    if arguments.profile:
        for name, fn in variants.items():
            profile = cProfile.Profile()
            profile.runcall(fn)
            print(f"\n{name}")
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()

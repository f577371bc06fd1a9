"""The cost of scores over long prompts: `measure` of three metrics relative to a plain prefill of the same model.

Run on a GPU:  python benchmarks/measure.py
On a CPU:      python benchmarks/measure.py --tiny

Variants take turns in one process. Scores are first compared with float64 rows, and the kernel with torch's rows; if
they differ, only the difference is printed.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import (
    QWEN3_VL_8B,
    TINY,
    Timing,
    as_json,
    demand,
    interleaved,
    make_sample,
    random_model,
    report,
    three_metrics,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from hooked_mllm import HookedMLLM, Sample
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.row_statistics import top_mask
from hooked_mllm.heads import head_name
from hooked_mllm.measuring.attention_rows import LayerRows
from hooked_mllm.measuring.query_selection import QuerySelection
from hooked_mllm.storage import ready_folder, write_text

QUESTION = 64
#: cuDNN first: the fastest of torch's kernels on Hopper
KERNELS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


def check(model: HookedMLLM, sample: Sample) -> None:
    """Compare the three metrics of up to three layers with attention rows in float64."""
    ram, ktr, mass = model.measure([sample], three_metrics(), progress=False)
    question, target, visual = (sample.mask(name)[0] for name in ("question", "target", "visual"))
    last = model.cfg.n_layers - 1
    for layer in sorted({0, last // 2, last} if len(sample) < 32768 else {0, 1}):
        _, cache = model.run_with_cache(
            sample, names_filter=f"blocks.{layer}.attn.hook_rot_[qk]", stop_at_layer=layer + 1
        )
        q, k = cache["rot_q", layer][0][question].double(), cache["rot_k", layer][0]
        group = q.shape[1] // k.shape[1]
        hidden = torch.arange(len(k), device=k.device) > question.nonzero()  # [query key]
        for head in range(0, q.shape[1], max(1, q.shape[1] // 8)):
            scores = q[:, head] @ k[:, head // group].double().T * q.shape[-1] ** -0.5
            profile = scores.masked_fill(hidden, float("-inf")).softmax(-1).mean(0)  # [query key] -> [key]
            for name, result, keys in (("RAM", ram, target), ("VisionMass", mass, visual)):
                error = abs(profile[keys].sum().item() - result.values[layer, head].item())
                demand(error < 1e-5, f"{name} of {head_name(layer, head)} by {error:.2g}")
            largest = profile.argsort(descending=True, stable=True)[: -(-len(k) * 5 // 100)]
            error = abs((target[largest].sum() / target.sum()).item() - ktr.values[layer, head].item())
            # rounding may reorder near-ties
            demand(error <= 2 / float(target.sum()), f"KTR of {head_name(layer, head)} by {error:.2g}")


def paths(n: int, layers: int, device: str) -> dict[str, Callable[[], Any]]:
    """The profile of random q and k and its largest keys, by kernel and by torch; compared first."""
    heads, kv, d = (32, 8, 128) if device == "cuda" else (4, 2, 16)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = [torch.randn(1, QUESTION, heads, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(layers)]
    k = [torch.randn(1, n, kv, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(layers)]
    question = torch.zeros(1, n, dtype=torch.bool)
    question[:, -QUESTION - 2 : -2] = True
    selection = QuerySelection("question", question.numpy(), torch.device(device))
    mask = [MaskRows(1, n, n, device, causal=True)] * layers

    def rows(implementation: str) -> LayerRows:
        return LayerRows({"question": q}, k, mask, [d**-0.5] * layers, 0, 1 << 30, implementation)

    profile, by_torch = (rows(implementation).profile(selection) for implementation in ("auto", "torch"))
    error = (profile - by_torch).abs().max().item() / by_torch.max().item()
    demand(error < 1e-4, f"the profile by kernel and by torch, by {error:.2g}")
    count = -(-n // 20)
    demand(torch.equal(top_mask(profile, count), top_mask(profile.cpu(), count).to(profile.device)), "the largest keys")
    return {
        f"profile, kernel ({layers} layers)": lambda: rows("auto").profile(selection),
        f"profile, torch ({layers} layers)": lambda: rows("torch").profile(selection),
        f"largest 5 %, kernel ({layers} layers)": lambda: top_mask(profile, count),
        f"largest 5 %, torch.topk ({layers} layers)": lambda: profile.topk(count, dim=-1),
    }


def main() -> None:
    """Check, then time, at each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a miniature on the CPU, to try the script")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 131072])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-eager", action="store_true")
    parser.add_argument("--skip-paths", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the raw numbers")
    arguments = parser.parse_args()
    if arguments.out:
        ready_folder(arguments.out)
    device = "cpu" if arguments.tiny else "cuda"
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    size, dtype = (TINY, torch.float32) if arguments.tiny else (QWEN3_VL_8B, torch.bfloat16)
    hf = random_model(size, device, dtype)
    model = HookedMLLM.from_model(hf)
    name = "CPU miniature" if arguments.tiny else f"{torch.cuda.get_device_name()}, Qwen3-VL-8B, random, bfloat16"
    print(f"{name}; torch {torch.__version__}")
    with sdpa_kernel(KERNELS, set_priority=True) if device == "cuda" else nullcontext():
        for n in arguments.tokens:
            run(model, n, arguments, device)


def run(model: HookedMLLM, n: int, arguments: argparse.Namespace, device: str) -> None:
    """Check, time and print one length."""
    hf, sample = model.hf_model, make_sample(model.hf_model, n, QUESTION, grid=16 if n < 4096 else 32)
    check(model, sample)
    weights = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0
    samples = [sample] * (8 if n < 4096 else 3 if n < 32768 else 1)

    def plain() -> None:
        for item in samples:
            hf.model(**item.inputs, use_cache=False)

    variants: dict[str, Callable[[], Any]] = {
        "plain prefill, no logits": plain,
        "measure, three metrics": lambda: model.measure(samples, three_metrics(), progress=False),
    }
    bases = dict.fromkeys(variants, "plain prefill, no logits")
    long = n >= 32768
    timings = interleaved(variants, 1, min(arguments.rounds, 3) if long else arguments.rounds, device, 0 if long else 2)
    if n == 8192 and not arguments.skip_eager:

        def eager() -> None:
            with model.attention("eager"):
                hf.model(**sample.inputs, use_cache=False)

        single = {"plain prefill, one sample": lambda: hf.model(**sample.inputs, use_cache=False) and None}
        single["the same, eager attention"] = eager
        timings |= interleaved(single, 1, 3, device)
        bases |= dict.fromkeys(single, "plain prefill, one sample")
    print(report(f"\n{n} tokens, {len(samples)} samples per call", timings, bases))
    base = timings["plain prefill, no logits"].peak_gib + weights
    for variant, timing in timings.items():
        if base:
            total = timing.peak_gib + weights
            print(f"{variant:<44}{total:>10.2f} GiB with the weights, ratio {total / base:.4f}")
    if not arguments.skip_paths:
        timings |= time_paths(n, arguments.rounds, device)
    sys.stdout.flush()
    if arguments.out:
        write_text(arguments.out / f"measure_{n}.json", as_json(timings))


def time_paths(n: int, rounds: int, device: str) -> dict[str, Timing]:
    """Time and print the profile and its largest keys, by kernel and by torch."""
    variants = paths(n, 36 if n < 4096 else 7 if n < 32768 else 1, device)
    kernels, by_torch = list(variants)[::2], list(variants)[1::2]
    timings = interleaved(variants, 5, rounds, device)
    print(report(f"\n{n} tokens, the parts", timings, dict(zip(kernels + by_torch, by_torch * 2, strict=True))))
    return timings


if __name__ == "__main__":
    main()

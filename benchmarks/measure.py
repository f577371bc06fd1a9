"""What scores over long prompts cost: `measure` of three metrics against a plain prefill of the same model.

Run on a GPU:  python benchmarks/measure.py
On a CPU:      python benchmarks/measure.py --tiny

Variants take turns in one process. Scores are compared with float64 rows first, and the kernel with torch's rows; where
they differ, nothing is printed but the difference.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import QWEN3_VL_8B, TINY, as_json, interleaved, make_sample, random_model, report
from torch.nn.attention import SDPBackend, sdpa_kernel

from hooked_mllm import HookedMLLM, Sample, metrics
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.row_statistics import top_mask
from hooked_mllm.measuring.attention_rows import LayerRows
from hooked_mllm.measuring.query_selection import QuerySelection
from hooked_mllm.storage import ready_folder, write_text

QUESTION = 64
#: cuDNN first: the fastest of torch's kernels on Hopper
KERNELS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


def demand(condition: bool, what: str) -> None:
    """Refuse to go on where results differ."""
    if not condition:
        sys.exit(f"results differ, so nothing is timed: {what}")


def three() -> list[Any]:
    """The metrics that are timed together."""
    return [metrics.RetrievalAttentionMass(), metrics.KeyTokenRatio(), metrics.VisionMass()]


def check(model: HookedMLLM, sample: Sample) -> None:
    """The three metrics of some layers against rows in float64."""
    ram, ktr, mass = model.measure([sample], three(), progress=False)
    question, target, visual = (sample.mask(name)[0] for name in ("question", "target", "visual"))
    last = model.cfg.n_layers - 1
    for layer in sorted({0, last // 2, last} if len(sample) < 32768 else {0, 1}):
        _, cache = model.run_with_cache(
            sample, names_filter=f"blocks.{layer}.attn.hook_rot_[qk]", stop_at_layer=layer + 1
        )
        q, k = cache["rot_q", layer][0][question].double(), cache["rot_k", layer][0]
        group = q.shape[1] // k.shape[1]
        hidden = torch.arange(len(k), device=k.device) > question.nonzero()
        for head in range(0, q.shape[1], max(1, q.shape[1] // 8)):
            scores = q[:, head] @ k[:, head // group].double().T * q.shape[-1] ** -0.5
            profile = scores.masked_fill(hidden, float("-inf")).softmax(-1).mean(0)
            for name, found, keys in (("RAM", ram, target), ("VisionMass", mass, visual)):
                error = abs(profile[keys].sum().item() - found.values[layer, head].item())
                demand(error < 1e-5, f"{name} of L{layer}H{head} by {error:.2g}")
            best = profile.argsort(descending=True, stable=True)[: -(-len(k) * 5 // 100)]
            error = abs((target[best].sum() / target.sum()).item() - ktr.values[layer, head].item())
            # near-ties may fall either way
            demand(error <= 2 / float(target.sum()), f"KTR of L{layer}H{head} by {error:.2g}")


def paths(n: int, layers: int, device: str) -> dict[str, Callable[[], Any]]:
    """The profile and its largest keys, by kernel and by torch, of some layers alone; compared first."""
    heads, kv, d = (32, 8, 128) if device == "cuda" else (4, 2, 16)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = [torch.randn(1, QUESTION, heads, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(layers)]
    k = [torch.randn(1, n, kv, d, device=device, dtype=dtype).transpose(1, 2) for _ in range(layers)]
    asked = torch.zeros(1, n, dtype=torch.bool)
    asked[:, -QUESTION - 2 : -2] = True
    selection = QuerySelection("question", asked.numpy(), torch.device(device))
    mask = [MaskRows(1, n, n, device, causal=True)] * layers

    def rows(how: str) -> LayerRows:
        return LayerRows({"question": q}, k, mask, [d**-0.5] * layers, 0, 1 << 30, how)

    found = {how: rows(how).profile(selection) for how in ("auto", "torch")}
    error = (found["auto"] - found["torch"]).abs().max().item() / found["torch"].max().item()
    demand(error < 1e-4, f"the profile by kernel and by torch, by {error:.2g}")
    profile, count = found["auto"], -(-n // 20)
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
    """One length."""
    hf, sample = model.hf_model, make_sample(model.hf_model, n, QUESTION, grid=16 if n < 4096 else 32)
    check(model, sample)
    weights = torch.cuda.memory_allocated() / 2**30 if device == "cuda" else 0.0
    many = [sample] * (8 if n < 4096 else 3 if n < 32768 else 1)

    def plain() -> None:
        for some in many:
            hf.model(**some.inputs, use_cache=False)

    variants: dict[str, Callable[[], Any]] = {
        "plain prefill, no logits": plain,
        "measure, three metrics": lambda: model.measure(many, three(), progress=False),
    }
    bases = dict.fromkeys(variants, "plain prefill, no logits")
    long = n >= 32768
    timings = interleaved(variants, 1, min(arguments.rounds, 3) if long else arguments.rounds, device, 0 if long else 2)
    if n == 8192 and not arguments.skip_eager:

        def eager() -> None:
            with model.attention("eager"):
                hf.model(**sample.inputs, use_cache=False)

        one = {"plain prefill, one sample": lambda: hf.model(**sample.inputs, use_cache=False) and None}
        one["the same, eager attention"] = eager
        timings |= interleaved(one, 1, 3, device)
        bases |= dict.fromkeys(one, "plain prefill, one sample")
    print(report(f"\n{n} tokens, {len(many)} samples a call", timings, bases))
    base = timings["plain prefill, no logits"].peak_gib + weights
    for variant, timing in timings.items():
        if base:
            total = timing.peak_gib + weights
            print(f"{variant:<44}{total:>10.2f} GiB with the weights, ratio {total / base:.4f}")
    if not arguments.skip_paths:
        own = paths(n, 36 if n < 4096 else 7 if n < 32768 else 1, device)
        first, second = list(own)[::2], list(own)[1::2]
        parts = interleaved(own, 5, arguments.rounds, device)
        print(
            report(f"\n{n} tokens, the parts", parts, {a: b for a, b in zip(first + second, second * 2, strict=True)})
        )
        timings |= parts
    sys.stdout.flush()
    if arguments.out:
        write_text(arguments.out / f"measure_{n}.json", as_json(timings))


if __name__ == "__main__":
    main()

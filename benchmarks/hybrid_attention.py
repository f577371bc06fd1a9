"""Hybrid attention against dense attention by cuDNN and FlashAttention-2, and FlexAttention of the same mask.

Run on a GPU:  python benchmarks/hybrid_attention.py --tokens 8192 131072

Variants take turns. Outputs are compared with the definition in float64 at 2,100 tokens, and with FlexAttention at the
lengths that are timed, before any ratio is printed.
"""

import argparse
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import as_json, interleaved, report
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.kernels.hybrid_attention import hybrid_attention, naive_hybrid_attention

HEADS, KV_HEADS, D_HEAD, SINK, WINDOW = 32, 8, 128, 64, 1024


def make(n: int) -> list[torch.Tensor]:
    """q, k, v as transformers hands them over."""
    shape = ((HEADS, KV_HEADS, KV_HEADS), n)
    return [torch.randn(1, n, h, D_HEAD, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in shape[0]]


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """The norm of the difference over that of y."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def check(dense: list[int]) -> None:
    """The kernel and SDPA against the definition in float64."""
    n = 2100
    q, k, v = make(n)
    bounds = torch.zeros(1, device="cuda"), torch.full((1,), n, device="cuda")
    wide = [x.double() for x in (q, k, v)]
    for heads in ([], dense, list(range(HEADS))):
        flags = torch.zeros(HEADS, dtype=torch.bool, device="cuda")
        flags[heads] = True
        want, _ = naive_hybrid_attention(*wide, flags, SINK, WINDOW, D_HEAD**-0.5, *bounds)
        error = relative(hybrid_attention(q, k, v, heads, sink=SINK, window=WINDOW), want)
        print(f"{len(heads)} dense heads, {n} tokens: relative error {error:.5f}")
        if not error < 4e-3:
            sys.exit("the kernel and the definition differ, so nothing is timed")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        error = relative(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), want)
    print(f"cuDNN, dense: relative error {error:.5f}")


def flex(n: int, dense: list[int]) -> Callable[..., Any]:
    """FlexAttention with the mask of hybrid attention."""
    flags = torch.zeros(HEADS, dtype=torch.bool, device="cuda")
    flags[dense] = True

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (flags[h] | (j < SINK) | (j > i - WINDOW))

    blocks = torch.compile(create_block_mask)(mask, None, HEADS, n, n, device="cuda")
    run = torch.compile(flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=blocks, enable_gqa=True)


def main() -> None:
    """Check, then time, at each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--dense", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-flex", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the raw numbers")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    dense = sorted(random.Random(0).sample(range(HEADS), arguments.dense))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; dense heads {dense}")
    check(dense)
    for n in arguments.tokens:
        q, k, v = make(n)

        def sdpa(backend: SDPBackend, q: Any = q, k: Any = k, v: Any = v) -> Any:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def ours(heads: list[int], how: str = "auto", q: Any = q, k: Any = k, v: Any = v) -> Any:
            return hybrid_attention(q, k, v, heads, sink=SINK, window=WINDOW, implementation=how)

        name = f"{len(dense)} dense"
        variants: dict[str, Callable[[], Any]] = {
            "cuDNN, all dense": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
            "FlashAttention-2, all dense": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
            "ours, none dense": lambda: ours([]),
            f"ours, {name}": lambda: ours(dense),
            f"ours, {name}, one launch": lambda: ours(dense, "triton"),
            "ours, all dense": lambda: ours(list(range(HEADS))),
        }
        if not arguments.skip_flex:
            same = flex(n, dense)
            error = relative(ours(dense), same(q, k, v))
            if not error < 6e-3:
                sys.exit(f"FlexAttention and the kernel differ by {error:.4f} at {n} tokens, so nothing is timed")
            variants[f"FlexAttention, {name}"] = partial(same, q, k, v)
        repeats = max(1, 65536 // n)
        timings = interleaved(variants, repeats, arguments.rounds, "cuda")
        print(report(f"{n} tokens", timings, dict.fromkeys(variants, "cuDNN, all dense")))
        if arguments.out:
            (arguments.out / f"hybrid_attention_{n}.json").write_text(as_json(timings))


if __name__ == "__main__":
    main()

"""Ways to compute the few dense heads of a long prompt: in one launch with the others, or by SDPA in several ways.

Run on a GPU:  python benchmarks/dense_heads.py
On a CPU:      python benchmarks/dense_heads.py --check

All ways are compared with one another before anything is timed; `--check` only compares, for random sets of heads.
The choice in `hooked_mllm.kernels.hybrid_attention` follows from the table.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import as_json, interleaved, report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.kernels.hybrid_attention import dispatch
from hooked_mllm.kernels.hybrid_attention.dispatch import SIDE_STREAMS, dense_by_sdpa
from hooked_mllm.storage import ready_folder, write_text

Way = Callable[..., AbstractContextManager[None]]
#: sets of dense heads of a layer with 32 query and 8 key-value heads
SETS = {
    "one": (5,),
    "two": (5, 20),
    "four, of four groups": (5, 12, 20, 30),
    "four, drawn by `bench kernel`": (2, 16, 24, 26),
    "four of one group": (0, 1, 2, 3),
    "all": tuple(range(32)),
}


def evenly(heads: list[int]) -> slice:
    """One or two heads as a slice, which needs no copy."""
    return slice(heads[0], heads[-1] + 1, max(heads[-1] - heads[0], 1))


def in_turn(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dense: tuple[int, ...], scale: float) -> None:
    """One call per head, one after the other."""
    size = q.shape[1] // k.shape[1]
    for head in dense:
        query_head, kv = slice(head, head + 1), slice(head // size, head // size + 1)
        z = scaled_dot_product_attention(q[:, query_head], k[:, kv], v[:, kv], is_causal=True, scale=scale)
        out[:, query_head] = z


def in_pairs(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dense: tuple[int, ...], scale: float) -> None:
    """Two heads of different groups in each call, as strided views."""
    size = q.shape[1] // k.shape[1]
    remaining = list(dense)
    while remaining:
        heads = [remaining.pop(0)]
        partner = next((head for head in remaining if head // size != heads[0] // size), None)
        if partner is not None:
            heads.append(partner)
            remaining.remove(partner)
        pair, kv = evenly(heads), evenly([head // size for head in heads])
        out[:, pair] = scaled_dot_product_attention(q[:, pair], k[:, kv], v[:, kv], is_causal=True, scale=scale)


def gathered(q: Tensor, k: Tensor, v: Tensor, out: Tensor, dense: tuple[int, ...], scale: float) -> None:
    """All dense heads in one call, on copies of their q, k and v."""
    size = q.shape[1] // k.shape[1]
    heads, kv = list(dense), [head // size for head in dense]
    out[:, heads] = scaled_dot_product_attention(q[:, heads], k[:, kv], v[:, kv], is_causal=True, scale=scale)


def before(way: Callable[..., None]) -> Way:
    """On the current stream, before the streaming heads."""

    @contextmanager
    def run(*arguments: Any) -> Iterator[None]:
        way(*arguments)
        yield

    return run


@contextmanager
def no_priority(*arguments: Any) -> Iterator[None]:
    """On separate streams with the priority of the current one."""
    with patch.object(dispatch, "_streams", plain_streams), dense_by_sdpa(*arguments):
        yield


@cache
def plain_streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Streams without priority."""
    return [torch.cuda.Stream(device) for _ in range(SIDE_STREAMS)]


WAYS: dict[str, Way] = {
    "separate streams": dense_by_sdpa,
    "separate streams, no priority": no_priority,
    "in turn": before(in_turn),
    "in turn, pairs": before(in_pairs),
    "gathered": before(gathered),
}


def check() -> None:
    """Compare every way with SDPA of all heads, for random sets of heads."""
    for seed in range(200):
        rng = random.Random(seed)
        heads, kv = rng.choice([(32, 8), (8, 8), (14, 2), (8, 1)])
        dense = tuple(sorted(rng.sample(range(heads), rng.randint(1, heads))))
        q, k, v = (torch.randn(1, 20, h, 8).transpose(1, 2) for h in (heads, kv, kv))
        expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
        for name, way in WAYS.items():
            others = [head for head in range(heads) if head not in dense]
            out = torch.full((1, 20, heads, 8), float("nan")).transpose(1, 2)
            with way(q, k, v, out, dense, 0.3):
                out[:, others] = 0
            error = (out[:, list(dense)] - expected[:, list(dense)]).abs().max().item()
            if not error < 1e-5 or not bool((out[:, others] == 0).all()):
                sys.exit(f"{name}: wrong for heads {dense} of {heads} over {kv}, by {error:.2g}")
    print("all ways agree")


def variants(q: Tensor, k: Tensor, v: Tensor, dense: tuple[int, ...]) -> dict[str, Callable[[], Tensor]]:
    """Hybrid attention with its dense heads computed in each way."""

    def run(sdpa: bool, way: Way) -> Tensor:
        with patch.object(dispatch, "dense_by_sdpa", way):
            return dispatch.triton_hybrid_attention(q, k, v, dense, 64, 1024, q.shape[3] ** -0.5, sdpa=sdpa)[0]

    one_launch: dict[str, Callable[[], Tensor]] = {"one launch": partial(run, False, dense_by_sdpa)}
    ways = dict(list(WAYS.items())[:1]) if len(dense) == q.shape[1] else WAYS
    return one_launch | {f"SDPA, {name}": partial(run, True, way) for name, way in ways.items()}


def main() -> None:
    """Check, then time, at each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="only compare the ways, on a CPU")
    parser.add_argument("--out", type=Path, help="folder for the raw numbers")
    arguments = parser.parse_args()
    if arguments.out:
        ready_folder(arguments.out)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    check()
    if arguments.check:
        return
    for n in arguments.tokens:
        q, k, v = (torch.randn(1, n, h, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in (32, 8, 8))

        def cudnn(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        timed: dict[str, Callable[[], Any]] = {"cuDNN, all dense": cudnn}
        for label, dense in SETS.items():
            ways = variants(q, k, v, dense)
            expected = ways["one launch"]().float()
            for name, run in ways.items():
                error = float((run().float() - expected).norm() / expected.norm())
                if not error < 4e-3:
                    sys.exit(f"{label} by {name} differs from one launch by {error:.4f}, so nothing is timed")
            del expected
            timed |= {f"{label}: {name}": run for name, run in ways.items()}
        timings = interleaved(timed, max(1, 65536 // n), arguments.rounds, "cuda")
        print(report(f"\n{n} tokens", timings, dict.fromkeys(timed, "cuDNN, all dense")))
        if arguments.out:
            write_text(arguments.out / f"dense_heads_{n}.json", as_json(timings))


if __name__ == "__main__":
    main()

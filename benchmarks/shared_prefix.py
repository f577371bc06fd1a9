"""What a second question on the same pictures costs: its prompt run whole, or its own tokens behind a kept prefix.

    python benchmarks/shared_prefix.py [ROUNDS]

On the bundled toys, on the CPU; variants take turns. Scores of both are compared before anything is timed. Prints the
least time per sample of all rounds, in milliseconds of CPU.
"""

import sys
import time

import torch

from hooked_mllm import HookedMLLM, metrics
from hooked_mllm.toys import VisualRetrieval

TOYS = ("toy-qwen3-vl", "toy-llava-onevision", "toy-internvl")
PAGES = (4, 16)
SAMPLES = 4


def row(model: HookedMLLM, pages: int, rounds: int) -> tuple[int, list[float], float]:
    """Tokens of a prompt; ms a sample of RAM, of pairs run whole, of pairs sharing their prefix; largest difference."""
    samples = VisualRetrieval(pages=pages).samples(model, SAMPLES)
    pairs = [list(metrics.NullQuery(reuse_prefix=reuse).pairs(model, samples)) for reuse in (False, True)]
    whole, shared = (model.measure(some, metrics.MMRetHeads(), progress=False) for some in pairs)
    difference = float((whole.values - shared.values).abs().max())
    if difference > 1e-5 or shared.provenance["shared_prefix"] != {"reused": SAMPLES, "whole": 0}:
        raise SystemExit(f"not the same scores: {difference}, {shared.provenance['shared_prefix']}")
    variants = [(samples, metrics.RetrievalAttentionMass), *((some, metrics.MMRetHeads) for some in pairs)]
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds):
        for kept, (some, metric) in zip(times, variants, strict=True):
            start = time.process_time()
            model.measure(some, metric(), progress=False)
            kept.append(1000 * (time.process_time() - start) / SAMPLES)
    return len(samples[0]), [min(kept) for kept in times], difference


if __name__ == "__main__":
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print("| model | tokens | one prompt (RAM) | pair, both whole | pair, prefix once | saved | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in TOYS:
        model = HookedMLLM.from_pretrained(name, dtype="float32", check=False)
        for pages in PAGES:
            tokens, (one, whole, shared), difference = row(model, pages, rounds)
            cells = [f"{ms:.0f}" for ms in (one, whole, shared)]
            print(
                f"| {name} | {tokens} | {' | '.join(cells)} | {1 - shared / whole:.0%} | {difference:.0e} |", flush=True
            )

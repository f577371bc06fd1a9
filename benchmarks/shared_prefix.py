"""The cost of a second question on the same pictures: the whole prompt, or only its own tokens after a cached prefix.

    python benchmarks/shared_prefix.py          # the bundled toys on the CPU
    python benchmarks/shared_prefix.py --gpu    # Qwen3-VL-8B with random weights, 1k and 8k tokens, one GPU with 40 GB

Variants take turns. Scores of both are compared before anything is timed. On the CPU it prints the minimum over rounds
of the milliseconds of CPU time per sample.
"""

import argparse
import time
from types import SimpleNamespace
from typing import Any

import torch
from common import QWEN3_VL_8B, interleaved, make_sample, random_model, report

from hooked_mllm import HeadScores, HookedMLLM, metrics
from hooked_mllm.toys import VisualRetrieval

TOYS = ("toy-qwen3-vl", "toy-llava-onevision", "toy-internvl")
PAGES = (4, 16)
SAMPLES = 4


def time_pages(model: HookedMLLM, pages: int, rounds: int) -> tuple[int, list[float], float]:
    """Tokens of a prompt, milliseconds per sample of three variants, and the largest difference of scores.

    The variants: RAM, pairs of whole prompts, and pairs that share their prefix.
    """
    samples = VisualRetrieval(pages=pages).samples(model, SAMPLES)
    pairs = [list(metrics.NullQuery(reuse_prefix=reuse).pairs(model, samples)) for reuse in (False, True)]
    whole, shared = (model.measure(inputs, metrics.MMRetHeads(), progress=False) for inputs in pairs)
    difference = float((whole.values - shared.values).abs().max())
    if difference > 1e-5 or shared.provenance["shared_prefix"] != {"reused": SAMPLES, "whole": 0}:
        raise SystemExit(f"not the same scores: {difference}, {shared.provenance['shared_prefix']}")
    variants = [(samples, metrics.RetrievalAttentionMass), *((inputs, metrics.MMRetHeads) for inputs in pairs)]
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(rounds):
        for variant_times, (inputs, metric) in zip(times, variants, strict=True):
            start = time.process_time()
            model.measure(inputs, metric(), progress=False)
            variant_times.append(1000 * (time.process_time() - start) / SAMPLES)
    return len(samples[0]), [min(variant_times) for variant_times in times], difference


def gpu(rounds: int) -> None:
    """Time and print pairs of one sample at a real model's size, with their memory in addition to the weights."""
    hf = random_model(QWEN3_VL_8B, "cuda", torch.bfloat16)
    # a null query of two tokens, the number of tokens of "N/A"
    tokenizer = SimpleNamespace(tokenizer=lambda *_, **__: {"input_ids": torch.tensor([[2000, 2001]])})
    model = HookedMLLM.from_model(hf, tokenizer, check=False)
    for n_tokens, grid in ((1024, 16), (8192, 32)):
        sample = make_sample(hf, n_tokens, 64, grid)
        whole, shared = (next(metrics.NullQuery(reuse_prefix=reuse).pairs(model, sample)) for reuse in (False, True))

        def run(inputs: Any, metric: type[metrics.HeadMetric]) -> HeadScores:
            return model.measure(inputs, metric(), progress=False)

        scores, shared_scores = (run(pair, metrics.MMRetHeads).values for pair in (whole, shared))
        error = (scores - shared_scores).abs().max()
        print(f"largest difference {error:.1e}, standard deviation of scores {scores.std():.1e}")
        variants = {
            "one prompt (RAM)": lambda sample=sample: run(sample, metrics.RetrievalAttentionMass),
            "pair, both whole": lambda pair=whole: run(pair, metrics.MMRetHeads),
            "pair, prefix once": lambda pair=shared: run(pair, metrics.MMRetHeads),
        }
        bases = dict.fromkeys(variants, "one prompt (RAM)")
        print(report(f"{n_tokens} tokens", interleaved(variants, 3, rounds, "cuda"), bases), flush=True)


def cpu(rounds: int) -> None:
    """Time the toys and print a Markdown table."""
    torch.set_num_threads(1)
    print("| model | tokens | one prompt (RAM) | pair, both whole | pair, prefix once | saved | largest difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in TOYS:
        model = HookedMLLM.from_pretrained(name, dtype="float32", check=False)
        for pages in PAGES:
            tokens, (single, whole, shared), difference = time_pages(model, pages, rounds)
            cells = [f"{ms:.0f}" for ms in (single, whole, shared)]
            cells += [f"{1 - shared / whole:.0%}", f"{difference:.0e}"]
            print(f"| {name} | {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    (gpu if arguments.gpu else cpu)(arguments.rounds)

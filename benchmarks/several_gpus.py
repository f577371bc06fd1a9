"""Head scores of a model on one GPU and spread over several: compares the numbers, the times and the memory.

Run on two GPUs or more:  python benchmarks/several_gpus.py --size 32b --tokens 131072
To try the script:        python benchmarks/several_gpus.py --size tiny --tokens 400 --device cpu

The model is made once on the first device and measured there. accelerate then spreads its blocks over the devices, with
the same weights. Metrics are measured under the model's own attention and under hybrid attention.
"""

import argparse
import json
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from common import QWEN3_VL_8B, QWEN3_VL_32B, TINY, make_sample, random_model, three_metrics

from hooked_mllm import HeadSet, HookedMLLM, Sample
from hooked_mllm.attention.hybrid import HybridAttention
from hooked_mllm.storage import ready_folder, write_text

SIZES = {"tiny": TINY, "8b": QWEN3_VL_8B, "32b": QWEN3_VL_32B}


def device_map(layers: int, devices: list[str]) -> dict[str, str]:
    """Blocks in equal parts over the devices, earlier modules on the first device, later ones on the last."""
    blocks = {f"model.language_model.layers.{l}": devices[l * len(devices) // layers] for l in range(layers)}
    earlier = ("model.visual", "model.language_model.embed_tokens", "model.language_model.rotary_emb")
    later = ("model.language_model.norm", "lm_head")
    return dict.fromkeys(earlier, devices[0]) | blocks | dict.fromkeys(later, devices[-1])


def measure(model: HookedMLLM, sample: Sample, heads: HeadSet | None, devices: list[str]) -> dict[str, Any]:
    """Scores of every head, the seconds of the measurement, and the peak memory of each device."""
    metrics = three_metrics()
    cuda = [device for device in devices if device.startswith("cuda")]
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with nullcontext() if heads is None else model.attention(HybridAttention(heads)):
        scores = model.measure(sample, metrics, progress=False)
    for device in cuda:
        torch.cuda.synchronize(device)
    return {
        "seconds": time.perf_counter() - start,
        "peak GiB": [round(torch.cuda.max_memory_allocated(d) / 2**30, 1) for d in cuda],
        "values": {type(m).__name__: s.values.cpu() for m, s in zip(metrics, scores, strict=True)},
    }


def largest_difference(results: dict[str, Any]) -> float:
    """The largest difference between one device and several, relative to the largest score; prints all of them."""
    overall = 0.0
    for kind in ("own attention", "hybrid attention"):
        one, several = (results[f"{kind}, {devices}"]["values"] for devices in ("one", "several"))
        for name in one:
            largest = float(one[name].max())
            difference = float((one[name] - several[name]).abs().max()) / largest
            print(f"{kind}, {name}: largest value {largest:.3g}, largest difference {difference:.3g} of it")
            overall = max(overall, difference)
    return overall


def main() -> None:
    """Measure on one device, spread, measure again, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="32b")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--own-tokens", type=int, help="tokens under the model's own attention, if fewer")
    parser.add_argument("--grid", type=int, default=64, help="the image has grid x grid visual tokens")
    parser.add_argument("--dense", type=int, default=200, help="dense heads under hybrid attention")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="folder for the numbers")
    arguments = parser.parse_args()
    if arguments.out:
        ready_folder(arguments.out)
    size = SIZES[arguments.size]
    count = torch.cuda.device_count() if arguments.device == "cuda" else 1
    devices = [f"cuda:{n}" for n in range(count)] if arguments.device == "cuda" else ["cpu"]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    hf_model = random_model(size, devices[0], dtype)
    layers, n_heads = size["text"]["num_hidden_layers"], size["text"]["num_attention_heads"]
    pairs = [(layer, head) for layer in range(layers) for head in range(n_heads)]
    dense = random.Random(0).sample(pairs, min(arguments.dense, len(pairs)))
    heads = HeadSet(dense, n_layers=layers, n_heads=n_heads)
    lengths = {"own attention": arguments.own_tokens or arguments.tokens, "hybrid attention": arguments.tokens}
    samples = {
        kind: make_sample(hf_model, n, 64, min(arguments.grid, int((n / 2) ** 0.5))) for kind, n in lengths.items()
    }
    results: dict[str, Any] = {}
    print(f"{arguments.size}, {lengths} tokens, {layers} x {n_heads} heads, {len(devices)} devices", flush=True)
    for number, used in (("one", devices[:1]), ("several", devices)):
        if number == "several":
            dispatch_model(hf_model, device_map(layers, devices), main_device=devices[0], force_hooks=True)
        model = HookedMLLM.from_model(hf_model)
        for kind, dense_heads in (("own attention", None), ("hybrid attention", heads)):
            measure(model, make_sample(hf_model, 512, 64, 8), dense_heads, used)  # compiles kernels, fills workspaces
            result = results[f"{kind}, {number}"] = measure(model, samples[kind], dense_heads, used)
            print(f"{kind}, {number:<10}{result['seconds']:>8.2f} s   peak GiB {result['peak GiB']}", flush=True)
    remove_hook_from_submodules(hf_model)
    difference = largest_difference(results)
    if arguments.out:
        numbers = {k: {**v, "values": {n: t.tolist() for n, t in v["values"].items()}} for k, v in results.items()}
        write_text(arguments.out / f"several_gpus_{arguments.size}.json", json.dumps(numbers))
    if not difference < 1e-5:
        raise SystemExit("the scores differ")


if __name__ == "__main__":
    main()

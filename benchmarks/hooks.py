"""The cost of hooks, caches and head metrics, relative to the plain forward pass, nnsight and TransformerLens.

Run on a GPU:  python benchmarks/hooks.py
On a CPU:      python benchmarks/hooks.py --tiny

Every ratio comes from one process in which variants take turns. Results are compared before anything is timed; if they
differ, only the difference is printed.
"""

import argparse
import warnings
from collections.abc import Callable
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
from einops import repeat
from torch import Tensor
from transformers import PreTrainedModel

from hooked_mllm import HookedMLLM, Sample
from hooked_mllm.storage import ready_folder, write_text

CACHED = ["blocks.*.attn.hook_z", "blocks.*.hook_resid_post"]


def plain_z_and_residuals(hf: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Z `[batch pos (head d_head)]` and the residual stream of every layer by bare torch hooks."""
    z: list[Tensor] = []
    residual: list[Tensor] = []
    handles = []
    for layer in hf.model.language_model.layers:
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: z.append(args[0])))
        handles.append(layer.register_forward_hook(lambda _, __, output: residual.append(output)))
    hf(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return z, residual


def check_ours(model: HookedMLLM, sample: Sample) -> None:
    """Compare logits and cached values bit for bit, and the metrics with patterns in float64."""
    hf = model.hf_model
    plain = hf(**sample.inputs, use_cache=False).logits
    demand(torch.equal(plain, model(sample)), "logits without hooks")
    z, residual = plain_z_and_residuals(hf, sample.inputs)
    logits, cache = model.run_with_cache(sample, names_filter=CACHED)
    demand(torch.equal(plain, logits), "logits with a cache")
    for layer in range(model.cfg.n_layers):
        demand(torch.equal(cache["z", layer].flatten(2), z[layer]), f"z of layer {layer}")
        demand(torch.equal(cache["resid_post", layer], residual[layer]), f"residual stream of layer {layer}")
    ram, ktr, mass = model.measure([sample], three_metrics(), progress=False)
    layers = sorted({0, model.cfg.n_layers // 2, model.cfg.n_layers - 1})
    _, cache = model.run_with_cache(sample, names_filter=[f"blocks.{x}.attn.hook_rot_[qk]" for x in layers])
    question, target, visual = (sample.mask(name)[0] for name in ("question", "target", "visual"))
    for layer in layers:
        q, k = cache["rot_q", layer][0].double(), cache["rot_k", layer][0].double()
        k = repeat(k, "key kv d_head -> key (kv group) d_head", group=q.shape[1] // k.shape[1])
        scores = torch.einsum("qhd,khd->hqk", q[question], k) * q.shape[-1] ** -0.5
        position = torch.arange(len(k), device=k.device)
        scores = scores.masked_fill(position > position[question][:, None], float("-inf"))
        profile = scores.softmax(-1).mean(1)  # [head query key] -> [head key]
        for name, result, keys in (("RAM", ram, target), ("VisionMass", mass, visual)):
            error = (profile[:, keys].sum(-1).cpu() - result.values[layer]).abs().max().item()
            demand(error < 1e-5, f"{name} of layer {layer} by {error:.2g}")
        largest = profile.argsort(dim=-1, descending=True, stable=True)[:, : -(-len(k) * 5 // 100)]
        hits = target[largest].sum(-1).double().cpu() / target.sum().cpu()
        error = (hits - ktr.values[layer]).abs().max().item()
        # rounding may reorder near-ties
        demand(error <= 2 / float(target.sum()), f"KTR of layer {layer} by {error:.2g}")


def call_repeatedly(fn: Callable[[], Any], n: int) -> None:
    """Call `fn` n times and discard the results."""
    for _ in range(n):
        fn()


def nnsight_variant(model: HookedMLLM, sample: Sample) -> Callable[[], Any]:
    """A call of nnsight that saves the same tensors."""
    from nnsight import NNsight

    traced = NNsight(model.hf_model)
    layers = traced.model.language_model.layers

    def run() -> Any:
        with traced.trace(**sample.inputs, use_cache=False):
            saved = list().save()
            for layer in layers:
                saved.append(layer.self_attn.o_proj.input)
                saved.append(layer.output)
        return saved

    saved = run()
    z, residual = plain_z_and_residuals(model.hf_model, sample.inputs)
    for layer in range(model.cfg.n_layers):
        demand(torch.equal(saved[2 * layer], z[layer]), f"nnsight's z of layer {layer}")
        demand(torch.equal(saved[2 * layer + 1], residual[layer]), f"nnsight's residual stream of layer {layer}")
    return run


def transformer_lens_variant(model: HookedMLLM, sample: Sample) -> Callable[[], Any]:
    """A call of TransformerLens's bridge that saves the same activations.

    The bridge sets eager attention and rebuilds the module tree.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")), unk_token="a", pad_token="a"
    )
    tokenizer.init_kwargs["name_or_path"] = tokenizer.name_or_path = "none"
    bridge = TransformerBridge.boot_transformers(
        "Qwen/Qwen3-VL-8B-Instruct", hf_model=model.hf_model, tokenizer=tokenizer
    )
    inputs = dict(sample.inputs)
    tokens = inputs.pop("input_ids")
    layers = range(model.cfg.n_layers)
    names = [name for i in layers for name in (f"blocks.{i}.attn.hook_z", f"blocks.{i}.hook_resid_post")]

    def run() -> Any:
        return bridge.run_with_cache(tokens, names_filter=names, **inputs)

    run()
    return run


def main() -> None:
    """Check, then time, at each length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a miniature on the CPU, to try the script")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the raw numbers")
    arguments = parser.parse_args()
    if arguments.out:
        ready_folder(arguments.out)
    device = "cpu" if arguments.tiny else "cuda"
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    hf = random_model(
        TINY if arguments.tiny else QWEN3_VL_8B, device, torch.float32 if arguments.tiny else torch.bfloat16
    )
    model = HookedMLLM.from_model(hf)
    title = (
        "CPU miniature" if arguments.tiny else f"{torch.cuda.get_device_name()}, Qwen3-VL-8B, random weights, bfloat16"
    )
    print(f"{title}; torch {torch.__version__}")
    samples = {n: make_sample(hf, n, 64, grid=16 if n < 4096 else 32) for n in arguments.tokens}
    for n, sample in samples.items():
        check_ours(model, sample)
        timings = time_length(model, n, sample, arguments, device)
        if arguments.out:
            write_text(arguments.out / f"hooks_{n}.json", as_json(timings))
    if not arguments.skip_peers:
        transformer_lens(model, samples, arguments.rounds, device)


def time_length(
    model: HookedMLLM, n: int, sample: Sample, arguments: argparse.Namespace, device: str
) -> dict[str, Timing]:
    """Time and print all variants at one length, except TransformerLens."""
    hf, count = model.hf_model, 8 if n < 4096 else 3
    samples = [sample] * count

    def plain() -> Tensor:
        return hf(**sample.inputs, use_cache=False).logits

    def trunk() -> None:
        hf.model(**sample.inputs, use_cache=False)

    variants: dict[str, Callable[[], Any]] = {
        "plain forward": plain,
        "plain forward, no logits": trunk,
        "hooked_mllm, no hooks": lambda: model(sample),
        "hooked_mllm, z and residuals cached": lambda: model.run_with_cache(sample, names_filter=CACHED),
        "hooked_mllm, everything cached": lambda: model.run_with_cache(sample),
        f"hooked_mllm, measure x{count}": lambda: model.measure(samples, three_metrics(), progress=False),
        f"plain forward x{count}": lambda: call_repeatedly(plain, count),
        f"plain forward, no logits x{count}": lambda: call_repeatedly(trunk, count),
    }
    bases = {name: "plain forward" for name in variants}
    bases[f"hooked_mllm, measure x{count}"] = f"plain forward x{count}"
    bases["measure against no logits"] = f"plain forward, no logits x{count}"
    if not arguments.skip_peers:
        try:
            variants["nnsight, z and residuals saved"] = nnsight_variant(model, sample)
            bases["nnsight, z and residuals saved"] = "plain forward"
        except ImportError as error:
            print(f"nnsight is not installed: {error}")
    repeats = {name: 1 if "x" in name.split()[-1] else count for name in variants}
    timings = interleaved(variants, repeats, arguments.rounds, device)
    timings["measure against no logits"] = timings[f"hooked_mllm, measure x{count}"]
    print(report(f"\n{n} tokens", timings, bases), flush=True)
    return timings


def transformer_lens(model: HookedMLLM, samples: dict[int, Sample], rounds: int, device: str) -> None:
    """Time TransformerLens, after all others: it changes the model, so the plain forward pass is timed first."""
    hf = model.hf_model
    plain = {
        n: interleaved({"plain forward": lambda s=sample: hf(**s.inputs, use_cache=False).logits}, 2, rounds, device)
        for n, sample in samples.items()
    }
    for n, sample in samples.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = transformer_lens_variant(model, sample)
            timings = {**plain[n], **interleaved({"TransformerLens, same names": run}, 2, rounds, device)}
            print(report(f"\n{n} tokens, the bridge", timings, dict.fromkeys(timings, "plain forward")), flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"\nTransformerLens at {n} tokens: out of memory", flush=True)
            torch.cuda.empty_cache()
        except Exception as error:  # any error is a result to report
            print(f"\nTransformerLens at {n} tokens does not run: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()

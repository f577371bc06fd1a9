"""`hooked-mllm bench`: a model's prefill, or the attention kernel alone, against cuDNN and FlashAttention-2."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hooked_mllm import plots
from hooked_mllm.bench.choices import BACKENDS, SIZES
from hooked_mllm.bench.compiled import text_backbone
from hooked_mllm.bench.configs import random_text_model
from hooked_mllm.bench.kernel import bench_kernel, kernel_table
from hooked_mllm.bench.prefill import bench_prefill, choose_heads
from hooked_mllm.bench.record import PrefillRecord
from hooked_mllm.bench.table import table
from hooked_mllm.bench.variants import Variant, default_backends, prefill_variants
from hooked_mllm.cli.arguments import device_and_dtype
from hooked_mllm.cli.files import folder, loading_bar
from hooked_mllm.errors import InputError
from hooked_mllm.model.loading import load_model
from hooked_mllm.storage import write_figure

_NEED_GPU = ("cudnn", "flash", "cudnn-compiled")
_NOT_THE_KERNEL = "On a {}, hybrid is its torch definition: its times are not those of the kernel."


def prefill(arguments: argparse.Namespace) -> None:
    """Load or make the model, compare, time, save, draw and print: what `hooked-mllm bench prefill` does."""
    device, dtype = device_and_dtype(arguments)
    kind = torch.device(device).type
    backends = _backends(arguments.backends, kind)
    out = folder(arguments.out) / "prefill.json"
    if out.exists() and not arguments.resume:
        raise InputError(f"{out} exists already: --resume continues it; or give another --out.")
    text, name, numbers = _text_model(arguments, device, dtype)
    shape = text.config.num_hidden_layers, text.config.num_attention_heads
    heads = choose_heads(numbers, *shape, arguments.heads, arguments.seed)
    how: dict[str, Any] = {"sink": arguments.sink, "window": arguments.window}
    how["implementation"] = "naive" if kind == "cpu" else "auto"
    variants = prefill_variants(backends, heads, **how)
    extremes = choose_heads([0, shape[0] * shape[1]], *shape, None, arguments.seed)
    hybrid = any(variant.dense is not None for variant in variants)
    try:
        record = bench_prefill(
            text,
            variants,
            arguments.contexts,
            name=name,
            runs=arguments.runs,
            warm_up=arguments.warm_up,
            seed=arguments.seed,
            settings={"dense_heads": str(arguments.heads or "random")},
            also_check=prefill_variants(["hybrid"], extremes, **how) if hybrid else (),
            out=out,
            resume=arguments.resume,
            progress=not arguments.quiet,
        )
    except KeyboardInterrupt:
        print(f"\n{_so_far(out, arguments.contexts, variants)}", file=sys.stderr)
        raise
    if kind != "cuda" and any(name.startswith("hybrid") for name in record.titles):
        print(_NOT_THE_KERNEL.format(kind.upper()), end="\n\n")
    print(table(record))
    print(out)
    if any(record.times(name) for name in record.titles):
        write_figure(out.with_suffix(".png"), plots.prefill(record))
        print(out.with_suffix(".png"))


def _backends(named: Sequence[str] | None, kind: str) -> Sequence[str]:
    """The backends to compare; raises for those that this device does not have."""
    unavailable = [name for name in named or () if name in _NEED_GPU] if kind != "cuda" else []
    if unavailable:
        rest = ", ".join(name for name in BACKENDS if name not in _NEED_GPU)
        needs = "needs" if len(unavailable) == 1 else "need"
        raise InputError(f"--backends {' '.join(unavailable)} {needs} a GPU; on a {kind.upper()}: {rest}.")
    return named or default_backends(kind)


def _so_far(out: Path, contexts: Sequence[int], variants: Sequence[Variant]) -> str:
    """The lengths that an interrupted run has finished."""
    lengths = set(contexts)
    if not out.exists():
        return f"None of {len(lengths)} lengths was finished: there is no {out}."
    record = PrefillRecord.load(out)
    done = sum(all(record.cell(n, v.name) for v in variants) for n in lengths)
    return f"{done} of {len(lengths)} lengths are in {out}: the same command with --resume continues."


def _text_model(arguments: argparse.Namespace, device: str, dtype: str) -> tuple[Any, str, list[int]]:
    """The text decoder, what it is called, and the numbers of dense heads."""
    if arguments.device_map is not None and arguments.device is not None:
        raise InputError("Give --device or --device-map, not both.")
    where: dict[str, Any] = {"device": device} if arguments.device_map is None else {"device_map": arguments.device_map}
    where["dtype"] = getattr(torch, dtype)
    if arguments.config is not None:
        text = random_text_model(arguments.config, seed=arguments.seed, **where)
        numbers = list(SIZES[arguments.config].dense)
        name = f"{arguments.config}, random weights"
    else:
        with loading_bar(not arguments.quiet):
            model, _ = load_model(arguments.model, **where)
        text, name = text_backbone(model), arguments.model
        heads = text.config.num_hidden_layers * text.config.num_attention_heads
        numbers = [round(share * heads) for share in (0.02, 0.05, 0.1)]
    return text, name, numbers if arguments.dense is None else arguments.dense


def kernel(arguments: argparse.Namespace) -> None:
    """Compare, time, save and print: what `hooked-mllm bench kernel` does."""
    out = folder(arguments.out) / "kernel.json"
    device, _ = device_and_dtype(arguments)
    names = ("dense", "heads", "kv_heads", "d_head", "sink", "window", "rounds", "seed")
    options = {name: getattr(arguments, name) for name in names}
    times = bench_kernel(arguments.tokens, flex=not arguments.skip_flex, device=device, out=out, **options)
    kind = torch.device(device).type
    if kind != "cuda":
        flex = "" if arguments.skip_flex else " FlexAttention is left out."
        print(_NOT_THE_KERNEL.format(kind.upper()) + flex, end="\n\n")
    print(kernel_table(times))
    print(out)

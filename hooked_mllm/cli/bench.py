"""`hooked-mllm bench`: a model's prefill, or the attention kernel alone, against cuDNN and FlashAttention-2."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hooked_mllm import plots
from hooked_mllm.bench.compiled import text_backbone
from hooked_mllm.bench.configs import SIZES, random_text_model
from hooked_mllm.bench.kernel import bench_kernel, kernel_table
from hooked_mllm.bench.prefill import RUNS, WARM_UP, bench_prefill, choose_heads
from hooked_mllm.bench.record import PrefillRecord
from hooked_mllm.bench.table import table
from hooked_mllm.bench.variants import BACKENDS, Variant, default_backends, prefill_variants
from hooked_mllm.cli.arguments import count, tokens, torch_device
from hooked_mllm.cli.files import folder, loading_bar
from hooked_mllm.errors import InputError
from hooked_mllm.model.loading import load_model
from hooked_mllm.storage import write_figure

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEED_GPU = ("cudnn", "flash", "cudnn-compiled")
_NOT_THE_KERNEL = "On a {}, hybrid is its torch definition: its times say nothing about the kernel."
_CONTEXTS = [8192, 16384, 32768, 65536, 131072]


def add_to(commands: Any) -> None:
    """The commands and their options."""
    bench = commands.add_parser("bench", help="time attention and prefill", description="Time attention and prefill.")
    kinds = bench.add_subparsers(dest="kind", required=True)
    _add_prefill(kinds)
    _add_kernel(kinds)


def prefill(arguments: argparse.Namespace) -> None:
    """Load or make the model, compare, time, save, draw and print: what `hooked-mllm bench prefill` does."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(device).type
    backends = _backends(arguments.backends, kind)
    out = folder(arguments.out) / "prefill.json"
    picture = out.with_suffix(".png")
    if out.exists() and not arguments.resume:
        raise InputError(f"{out} is there already: --resume continues it; or give another --out.")
    text, name, numbers = _text_model(arguments, device)
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
    if draw(record, picture):
        print(picture)


def _backends(named: Sequence[str] | None, kind: str) -> Sequence[str]:
    """What to compare; refused where it would be another kernel under its name, or an error of torch's."""
    refused = [name for name in named or () if name in _NEED_GPU] if kind != "cuda" else []
    if refused:
        rest = ", ".join(name for name in BACKENDS if name not in _NEED_GPU)
        needs = "needs" if len(refused) == 1 else "need"
        raise InputError(f"--backends {' '.join(refused)} {needs} a GPU; on a {kind.upper()}: {rest}.")
    return named or default_backends(kind)


def _so_far(out: Path, contexts: Sequence[int], variants: Sequence[Variant]) -> str:
    """What a stopped run leaves: whole lengths are kept, the one under way is not."""
    asked = set(contexts)
    if not out.exists():
        return f"None of {len(asked)} lengths was finished: there is no {out}."
    record = PrefillRecord.load(out)
    done = sum(all(record.cell(n, v.name) for v in variants) for n in asked)
    return f"{done} of {len(asked)} lengths are in {out}: the same command with --resume goes on."


def _text_model(arguments: argparse.Namespace, device: str) -> tuple[Any, str, list[int]]:
    """The text decoder, what it is called, and the numbers of dense heads."""
    if arguments.device_map is not None and arguments.device is not None:
        raise InputError("Give --device or --device-map, not both.")
    where: dict[str, Any] = {"device": device} if arguments.device_map is None else {"device_map": arguments.device_map}
    where["dtype"] = _DTYPES[arguments.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")]
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


def draw(record: PrefillRecord, path: Path) -> bool:
    """The picture of a record; False if every cell of it failed."""
    drawn = any(record.times(name) for name in record.titles)
    if drawn:
        write_figure(path, plots.prefill(record))
    return drawn


def kernel(arguments: argparse.Namespace) -> None:
    """Compare, time, save and print: what `hooked-mllm bench kernel` does."""
    out = folder(arguments.out) / "kernel.json"
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = bench_kernel(
        arguments.tokens,
        dense=arguments.dense,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        d_head=arguments.d_head,
        sink=arguments.sink,
        window=arguments.window,
        rounds=arguments.rounds,
        flex=not arguments.skip_flex,
        seed=arguments.seed,
        device=device,
        out=out,
    )
    kind = torch.device(device).type
    if kind != "cuda":
        flex = "" if arguments.skip_flex else " FlexAttention is left out."
        print(_NOT_THE_KERNEL.format(kind.upper()) + flex, end="\n\n")
    print(kernel_table(found))
    print(out)


def _parser(kinds: Any, name: str, what: str, run: Any) -> Any:
    parser = kinds.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def _common(add: Any) -> None:
    add("--sink", type=partial(count, least=0), default=64, help="first tokens that streaming heads see")
    add("--window", type=count, default=1024, help="last tokens that streaming heads see")
    add("--device", type=torch_device, help="torch device (cuda if there is one, else cpu)")
    add("--seed", type=int, default=0, help="of random heads, token ids and weights")
    add("--out", type=Path, default=Path("hooked-mllm-out"), help="folder for the results")


def _add_prefill(kinds: Any) -> None:
    parser = _parser(kinds, "prefill", "time the prefill of a whole text decoder under several attentions", prefill)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a checkpoint's folder, hub id, or a bundled toy: its text decoder")
    source.add_argument("--config", choices=list(SIZES), help="a published size with random weights")
    add = parser.add_argument
    add("--contexts", type=tokens, nargs="+", default=_CONTEXTS, help="lengths, such as 8k 131072")
    add("--dense", type=partial(count, least=0), nargs="+", help="numbers of dense heads (of --config: the paper's)")
    add("--heads", type=Path, help="saved head scores: dense are the top ones (else random heads)")
    add("--backends", nargs="+", choices=list(BACKENDS), metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    add("--runs", type=count, default=RUNS, help="timed forwards of each variant at each length")
    add("--warm-up", type=count, default=WARM_UP, help="forwards before them")
    add("--dtype", choices=list(_DTYPES), help="of the weights (float32 on a CPU, else bfloat16)")
    add("--device-map", choices=["auto", "balanced"], help="spread the layers over all GPUs")
    add("--resume", action="store_true", help="continue the record that is there: finished cells are left out")
    add("--quiet", action="store_true", help="no progress bar")
    _common(add)


def _add_kernel(kinds: Any) -> None:
    parser = _parser(kinds, "kernel", "time the hybrid attention op alone against other kernels", kernel)
    add = parser.add_argument
    add("--tokens", type=tokens, nargs="+", default=[8192, 32768, 131072], help="lengths, such as 8k 131072")
    add("--dense", type=partial(count, least=0), default=4, help="dense heads")
    add("--heads", type=count, default=32, help="query heads")
    add("--kv-heads", type=count, default=8, help="key-value heads")
    add("--d-head", type=count, default=128, help="width of a head")
    add("--rounds", type=count, default=7, help="readings of each variant")
    add("--skip-flex", action="store_true", help="without FlexAttention")
    _common(add)

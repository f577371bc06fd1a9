"""The hybrid attention op alone, against dense attention by cuDNN and FlashAttention-2, and FlexAttention."""

import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.bench.check import largest_error, relative_error
from hooked_mllm.bench.record import provenance
from hooked_mllm.bench.timing import failure, milliseconds, peak_memory
from hooked_mllm.display.text import text_table
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.kernels.hybrid_attention import hybrid_attention, naive_hybrid_attention
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window, head_flags
from hooked_mllm.storage import ready, write_json

KIND = "hooked_mllm kernel benchmark"
READING_MS = 50
#: relative errors allowed: against the definition in float64, and between the kernel and FlexAttention
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 6e-3)}


@torch.no_grad()
def bench_kernel(
    lengths: Sequence[int],
    *,
    dense: int = 4,
    heads: int = 32,
    kv_heads: int = 8,
    d_head: int = 128,
    sink: WholeNumber = 64,
    window: WholeNumber = 1024,
    rounds: int = 7,
    flex: bool = True,
    seed: int = 0,
    device: str = "cuda",
    out: Path | None = None,
) -> dict[str, Any]:
    """Time the op at each length, after its outputs were compared; variants take turns.

    bfloat16 on a GPU. On a CPU, float32, torch's choice of SDPA and no FlexAttention: to try it out.

    Args:
        lengths: Tokens.
        dense: Dense heads, drawn at random.
        heads: Query heads.
        kv_heads: Key-value heads.
        d_head: Width of a head.
        sink: First keys that streaming heads see.
        window: Last keys that they see.
        rounds: Readings of each variant.
        flex: Also time FlexAttention.
        seed: Of heads and inputs.
        device: Where.
        out: Write what is found there, as JSON.

    Returns:
        What is written: settings, provenance, checks, and for every length the milliseconds of every round.

    Raises:
        NumericsError: if outputs differ from the definition's in float64 at a short length, or from FlexAttention's at
            a timed one.
        InputError: for more dense heads than heads, heads that do not divide, or a sink or window out of range.
        CacheFileError: If `out` cannot be written.
    """
    if dense > heads or heads % kv_heads:
        raise InputError(
            f"Expected no more dense heads than heads, and heads in groups of one size over key-value heads; got "
            f"{dense} dense of {heads} heads over {kv_heads} key-value heads."
        )
    sink, window = check_sink_and_window(sink, window)
    ready(out)
    gpu = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    chosen = sorted(random.Random(seed).sample(range(heads), dense))
    generator = torch.Generator(device).manual_seed(seed)
    how = {"sink": sink, "window": window, "implementation": "auto" if gpu else "naive"}

    def inputs(n: int) -> list[Tensor]:
        """q, k, v as transformers passes them."""
        shapes = [(1, n, h, d_head) for h in (heads, kv_heads, kv_heads)]
        return [torch.randn(s, device=device, generator=generator).to(dtype).transpose(1, 2) for s in shapes]

    found: dict[str, Any] = {
        "settings": {
            "heads": heads, "kv_heads": kv_heads, "d_head": d_head, "dense": chosen, "sink": sink, "window": window,
            "dtype": str(dtype).removeprefix("torch."), "rounds": rounds, "seed": seed,
        },
        "provenance": provenance([torch.device(device)]),
        "checks": _against_definition(inputs(2 * (sink + window) + 37), chosen, how, dtype),
        "lengths": {},
    }  # fmt: skip
    for n in lengths:
        q, k, v = inputs(n)
        variants = _variants(q, k, v, chosen, how, gpu)
        others = {}
        if gpu:
            others["one launch of the kernel"] = variants[f"hybrid, {dense} dense, one launch"]
        if flex and gpu:
            others["FlexAttention"] = partial(_flex(n, heads, chosen, sink, window, device), q, k, v)
            variants[f"FlexAttention, {dense} dense"] = others["FlexAttention"]
        for name, other in others.items():
            error = largest_error(variants[f"hybrid, {dense} dense"](), other())
            found["checks"].append({"against": name, "tokens": n, "error": error})
            if not error < LIMITS[dtype][1]:
                raise NumericsError(
                    f"The op differs from {name} by {error:.2g} in some head and place at {n} tokens: nothing is timed."
                )
        found["lengths"][str(n)] = _timed(variants, rounds, torch.device(device))
        if out is not None:
            write_json(out, KIND, found)
    return found


def kernel_table(found: dict[str, Any]) -> str:
    """Medians, how many times as fast as cuDNN's dense attention (median over rounds), its range, and memory."""
    settings = found["settings"]
    lines = [
        f"{settings['heads']} query and {settings['kv_heads']} key-value heads of width {settings['d_head']}, sink "
        f"{settings['sink']}, window {settings['window']}, {settings['dtype']}, {found['provenance']['devices'][0]}",
        *(f"relative error against {c['against']}, {c['tokens']:,} tokens: {c['error']:.2g}" for c in found["checks"]),
    ]
    for n, rows in found["lengths"].items():
        base = next(iter(rows))
        lines += ["", f"{int(n):,} tokens; ratios: {base} over the row"]
        table = [("variant", "median ms", "ratio", "range", "added GiB")]
        table += [_line(name, row, rows[base]["ms"]) for name, row in rows.items()]
        lines.append(text_table(table, align="<>>>>", least=(34, 10, 7, 14, 9)))
    return "\n".join(lines)


def _line(name: str, row: dict[str, Any], base_ms: list[float]) -> tuple[str, str, str, str, str]:
    if row["failed"]:
        return name, row["failed"], "", "", ""
    ratio = spread = ""
    if base_ms:
        ratios = sorted(b / a for a, b in zip(row["ms"], base_ms, strict=True))
        ratio, spread = f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
    added = "" if row["added_gib"] is None else f"{row['added_gib']:.2f}"
    return name, f"{statistics.median(row['ms']):.3f}", ratio, spread, added


def _against_definition(qkv: list[Tensor], chosen: list[int], how: dict[str, Any], dtype: Any) -> list[dict[str, Any]]:
    """The op and SDPA against float64."""
    q, k, v = qkv
    n, heads = q.shape[2], q.shape[1]
    start, end = torch.zeros(1, dtype=torch.long, device=q.device), torch.full((1,), n, device=q.device)
    wide_q, wide_k, wide_v = (x.double() for x in qkv)
    found = []
    for some in ([], chosen, list(range(heads))):
        flags = head_flags(some, heads, q.device)
        scale = q.shape[-1] ** -0.5
        sizes = how["sink"], how["window"], scale
        want, _ = naive_hybrid_attention(wide_q, wide_k, wide_v, flags, *sizes, start, end)
        error = relative_error(hybrid_attention(q, k, v, some, **how), want)
        found.append({"against": f"float64, {len(some)} dense", "tokens": n, "error": error})
        if not error < LIMITS[dtype][0]:
            raise NumericsError(
                f"The op with {len(some)} dense heads differs from the definition in float64 by {error:.2g} at {n} "
                "tokens: nothing is timed."
            )
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found.append({"against": "float64 (torch's SDPA, all dense)", "tokens": n, "error": relative_error(dense, want)})
    return found


def _variants(
    q: Tensor, k: Tensor, v: Tensor, chosen: list[int], how: dict[str, Any], gpu: bool
) -> dict[str, Callable[[], Tensor]]:
    def sdpa(backend: SDPBackend | None) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def hybrid(dense: list[int], **more: Any) -> Tensor:
        return hybrid_attention(q, k, v, dense, **{**how, **more})

    found: dict[str, Callable[[], Tensor]] = {"SDPA, all dense": partial(sdpa, None)}
    if gpu:
        found = {
            "cuDNN, all dense": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
            "FlashAttention-2, all dense": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        }
    found["hybrid, none dense"] = partial(hybrid, [])
    found[f"hybrid, {len(chosen)} dense"] = partial(hybrid, chosen)
    if gpu:
        found[f"hybrid, {len(chosen)} dense, one launch"] = partial(hybrid, chosen, implementation="triton")
    found["hybrid, all dense"] = partial(hybrid, list(range(q.shape[1])))
    return found


def _flex(n: int, heads: int, chosen: list[int], sink: int, window: int, device: str) -> Callable[..., Tensor]:
    """FlexAttention with the mask of hybrid attention."""
    flags = head_flags(chosen, heads, device)
    mask = hybrid_mask(flags, sink, window)
    blocks: Any = torch.compile(create_block_mask)(mask, None, heads, n, n, device=device)
    run: Any = torch.compile(flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=blocks, enable_gqa=True)


def hybrid_mask(dense: Bool[Tensor, " head"], sink: int, window: int) -> Callable[..., Tensor]:
    """The mask of hybrid attention as FlexAttention takes it: a function of batch, head, query and key indices."""

    @no_type_check  # FlexAttention counts the arguments, which the wrapper of a checked function does not show
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (dense[head] | (key < sink) | (key > query - window))

    return visible


def _timed(variants: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    repeats = dict.fromkeys(variants, 1)
    rows: dict[str, dict[str, Any]] = {name: {"ms": [], "failed": None, "added_gib": None} for name in variants}

    def step(name: str, read: bool) -> None:
        run, row = variants[name], rows[name]
        if read:
            row["ms"].append(milliseconds(partial(_many, run, repeats[name]), [device]) / repeats[name])
            return
        run()
        memory = peak_memory(run, [device])
        row["added_gib"] = None if memory is None else memory[1]
        if device.type == "cuda":  # a reading over less would hold the host's time for a call
            repeats[name] = max(1, min(200, round(READING_MS / milliseconds(run, [device]))))

    for read in [False] + [True] * rounds:
        for name, row in rows.items():
            if row["failed"] is None:
                try:
                    step(name, read)
                except RuntimeError as error:
                    row["failed"], row["ms"] = failure(error), []
                    if row["failed"] is None:
                        raise
    return rows


def _many(run: Callable[[], Any], n: int) -> None:
    for _ in range(n):
        run()

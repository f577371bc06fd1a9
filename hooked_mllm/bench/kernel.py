"""Times the hybrid attention op against dense attention by cuDNN and FlashAttention-2, and against FlexAttention."""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, no_type_check

import torch
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
from hooked_mllm.kernels.implementations import HeadFlags, Keys, Queries
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window, head_flags
from hooked_mllm.storage import ready, write_json

KIND = "hooked_mllm kernel benchmark"
#: the shortest clock reading: calls are repeated until they take this long
READING_MS = 50
#: relative errors allowed: against the definition in float64, and between the op and other kernels
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 6e-3)}
Variants = dict[str, Callable[[], Tensor]]


#: queries, keys and values of one length
Inputs = tuple[Queries, Keys, Keys]


@torch.no_grad()
def bench_kernel(
    lengths: Sequence[int], *, dense: int = 4, heads: int = 32, kv_heads: int = 8, d_head: int = 128,
    sink: WholeNumber = 64, window: WholeNumber = 1024, rounds: int = 7, flex: bool = True, seed: int = 0,
    device: str = "cuda", out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare the outputs of the op, then time it at each length in bfloat16; variants take turns.

    On a CPU, as a trial: float32, torch's choice of SDPA and no FlexAttention.

    Args:
        lengths: Numbers of tokens.
        dense: Number of dense heads, which are drawn at random.
        heads: Query heads.
        kv_heads: Key-value heads.
        d_head: Width of a head.
        sink: First keys that streaming heads see.
        window: Last keys that they see.
        rounds: Clock readings of each variant.
        flex: Also time FlexAttention.
        seed: Seed of heads and inputs.
        device: Device of the inputs.
        out: File for the results, as JSON.

    Returns:
        Settings, provenance, checks, and for every length the milliseconds of every round.

    Raises:
        NumericsError: If outputs differ from those of the definition in float64, or of FlexAttention.
        InputError: For more dense heads than heads, heads that do not divide, or a sink or window out of range.
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
    dense_heads = sorted(random.Random(seed).sample(range(heads), dense))
    generator = torch.Generator(device).manual_seed(seed)
    how: dict[str, Any] = {"sink": sink, "window": window, "implementation": "auto" if gpu else "naive"}

    def inputs(n: int) -> Inputs:
        """q, k and v with the strides of transformers' projections, `[batch query head d_head]` in memory."""
        shapes = [(1, n, h, d_head) for h in (heads, kv_heads, kv_heads)]
        normal = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
        q, k, v = (x.to(dtype).transpose(1, 2) for x in normal)
        return q, k, v

    results: dict[str, Any] = {
        "settings": {
            "heads": heads, "kv_heads": kv_heads, "d_head": d_head, "dense": dense_heads, "sink": sink,
            "window": window, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds, "seed": seed,
        },
        "provenance": provenance([torch.device(device)]),
        "checks": _against_definition(inputs(2 * (sink + window) + 37), dense_heads, how),
        "lengths": {},
    }  # fmt: skip
    for n in lengths:
        variants = _variants(inputs(n), dense_heads, how, flex)
        results["checks"] += _against_others(variants, n, dense, LIMITS[dtype][1])
        results["lengths"][str(n)] = _timed(variants, rounds, torch.device(device))
        if out is not None:
            write_json(out, KIND, results)
    return results


def kernel_table(results: dict[str, Any]) -> str:
    """Medians, speedups over the first variant (median over rounds), their range, and memory, of `bench_kernel`."""
    settings, checks = results["settings"], results["checks"]
    lines = [
        f"{settings['heads']} query and {settings['kv_heads']} key-value heads of width {settings['d_head']}, sink "
        f"{settings['sink']}, window {settings['window']}, {settings['dtype']}, {results['provenance']['devices'][0]}",
        *(f"relative error against {c['against']}, {c['tokens']:,} tokens: {c['error']:.2g}" for c in checks),
    ]
    for n, rows in results["lengths"].items():
        base = next(iter(rows))
        lines += ["", f"{int(n):,} tokens; ratios: time of {base} / time of the variant"]
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


def _against_definition(inputs: Inputs, dense_heads: list[int], how: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the op and SDPA with the definition in float64."""
    q, k, v = inputs
    n, heads = q.shape[2], q.shape[1]
    start, end = torch.zeros(1, dtype=torch.long, device=q.device), torch.full((1,), n, device=q.device)
    q64, k64, v64 = (x.double() for x in inputs)
    sizes = how["sink"], how["window"], q.shape[-1] ** -0.5
    checks = []
    for dense in ([], dense_heads, list(range(heads))):
        flags = head_flags(dense, heads, q.device)
        expected, _ = naive_hybrid_attention(q64, k64, v64, flags, *sizes, start, end)
        error = relative_error(hybrid_attention(q, k, v, dense, **how), expected)
        checks.append({"against": f"float64, {len(dense)} dense", "tokens": n, "error": error})
        if not error < LIMITS[q.dtype][0]:
            raise NumericsError(
                f"The op with {len(dense)} dense heads differs from the definition in float64 by {error:.2g} at {n} "
                "tokens: nothing is timed."
            )
    z = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    checks.append({"against": "float64 (torch's SDPA, all dense)", "tokens": n, "error": relative_error(z, expected)})
    return checks


def _against_others(variants: Variants, n: int, dense: int, limit: float) -> Iterator[dict[str, Any]]:
    """Compare the op with one launch of its kernel and with FlexAttention, as far as they are timed."""
    hybrid, flex = f"hybrid, {dense} dense", f"FlexAttention, {dense} dense"
    for name, variant in (("one launch of the kernel", f"{hybrid}, one launch"), ("FlexAttention", flex)):
        if variant in variants:
            error = largest_error(variants[hybrid](), variants[variant]())
            yield {"against": name, "tokens": n, "error": error}
            if not error < limit:
                raise NumericsError(
                    f"The op differs from {name} by {error:.2g} in some head and chunk of queries at {n} tokens: "
                    "nothing is timed."
                )


def _variants(inputs: Inputs, dense_heads: list[int], how: dict[str, Any], flex: bool) -> Variants:
    q, k, v = inputs
    label = f"{len(dense_heads)} dense"

    def sdpa(backend: SDPBackend | None) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def hybrid(dense: list[int], **other: Any) -> Tensor:
        return hybrid_attention(q, k, v, dense, **{**how, **other})

    variants: Variants = {"SDPA, all dense": partial(sdpa, None)}
    if q.is_cuda:
        variants = {
            "cuDNN, all dense": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
            "FlashAttention-2, all dense": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        }
    variants["hybrid, none dense"] = partial(hybrid, [])
    variants[f"hybrid, {label}"] = partial(hybrid, dense_heads)
    if q.is_cuda:
        variants[f"hybrid, {label}, one launch"] = partial(hybrid, dense_heads, implementation="triton")
    variants["hybrid, all dense"] = partial(hybrid, list(range(q.shape[1])))
    if q.is_cuda and flex:
        variants[f"FlexAttention, {label}"] = _flex(inputs, dense_heads, how)
    return variants


def _flex(inputs: Inputs, dense_heads: list[int], how: dict[str, Any]) -> Callable[[], Tensor]:
    """FlexAttention with the mask of hybrid attention."""
    (_, heads, n, _), device = inputs[0].shape, inputs[0].device
    mask = hybrid_mask(head_flags(dense_heads, heads, device), how["sink"], how["window"])
    blocks: Any = torch.compile(create_block_mask)(mask, None, heads, n, n, device=device)
    run: Any = torch.compile(flex_attention)
    return lambda: run(*inputs, block_mask=blocks, enable_gqa=True)


def hybrid_mask(dense: HeadFlags, sink: int, window: int) -> Callable[..., Tensor]:
    """The mask of hybrid attention for FlexAttention: a function of batch, head, query and key indices."""

    @no_type_check  # FlexAttention counts the arguments, which the wrapper of a checked function does not show
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (dense[head] | (key < sink) | (key > query - window))

    return visible


def _timed(variants: Variants, rounds: int, device: torch.device) -> Mapping[str, dict[str, Any]]:
    """Milliseconds and memory of each variant; a variant that fails is recorded as failed and left out."""
    repeats = dict.fromkeys(variants, 1)
    rows: dict[str, dict[str, Any]] = {name: {"ms": [], "failed": None, "added_gib": None} for name in variants}

    def step(name: str, read: bool) -> None:
        run, row = variants[name], rows[name]
        if read:
            row["ms"].append(milliseconds(partial(_repeat, run, repeats[name]), [device]) / repeats[name])
            return
        run()
        memory = peak_memory(run, [device])
        row["added_gib"] = None if memory is None else memory[1]
        if device.type == "cuda":  # a shorter reading would measure the host's time of a call
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


def _repeat(run: Callable[[], object], n: int) -> None:
    for _ in range(n):
        run()

"""Times the prefill of a whole text decoder, with the protocol of arXiv:2606.05843, appendix G.4."""

import gc
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hooked_mllm.bench.check import check_at_length, check_variants, input_device
from hooked_mllm.bench.choices import RUNS, WARM_UP
from hooked_mllm.bench.compiled import CompiledBlocks
from hooked_mllm.bench.record import Cell, PrefillRecord, provenance
from hooked_mllm.bench.timing import clock_name, failure, milliseconds, peak_memory, used_devices
from hooked_mllm.bench.variants import Variant
from hooked_mllm.display.head_names import is_heads_text
from hooked_mllm.errors import InputError
from hooked_mllm.families.parts import decoder_sizes
from hooked_mllm.heads import HeadScores, HeadSet, HeadsLike, head_names, parse_heads
from hooked_mllm.storage import ready


@torch.no_grad()
def bench_prefill(
    model: PreTrainedModel, variants: Sequence[Variant], contexts: Iterable[int], *, name: str,
    runs: int = RUNS, warm_up: int = WARM_UP, seed: int = 0, settings: Mapping[str, Any] | None = None,
    also_check: Sequence[Variant] = (), out: Path | None = None, resume: bool = False, progress: bool = True,
) -> PrefillRecord:  # fmt: skip
    """Time a text decoder's forward pass under each variant at each length.

    Random token ids, batch 1, no padding, no cache, no logits. Outputs are compared first. At each length every variant
    is warmed up, then variants take turns, one forward pass each. Out of memory is recorded as failed.

    Args:
        model: A text decoder, such as that of `random_text_model`.
        variants: The variants to time.
        contexts: Lengths in tokens.
        name: Name of the model in the record.
        runs: Timed forward passes of each variant at each length.
        warm_up: Forward passes before them, at least 1.
        seed: Seed of the token ids.
        settings: Further settings that a continued record must share.
        also_check: Variants whose outputs are compared but not timed.
        out: File of the record, which is written after every length.
        resume: Continue the record at `out` with the cells that it lacks.
        progress: Show a progress bar.

    Raises:
        NumericsError: If a variant's outputs are wrong; nothing is timed then.
        InputError: If a record at `out` cannot be continued, or exists without `resume`.
        CacheFileError: If `out` cannot be written.

    Source: arXiv:2606.05843, appendix G.4.
    """
    ready(out)
    contexts = sorted(dict.fromkeys(contexts))
    devices = used_devices(model)
    run_settings = _settings(model, variants, name, runs, warm_up, seed, devices) | dict(settings or {})
    record = PrefillRecord(run_settings)
    if out is not None and out.exists():
        if not resume:
            raise InputError(f"{out} exists already: --resume continues it; or give another --out.")
        record = PrefillRecord.load(out).continued(run_settings)
    todo = {n: [v for v in variants if record.cell(n, v.name) is None] for n in contexts}
    if not any(todo.values()):
        return record
    session = len(record.sessions)
    record.titles |= {v.name: v.title for v in variants}
    record.sessions.append(provenance(devices) | {"started": time.strftime("%Y-%m-%d %H:%M:%S")})
    compiled = CompiledBlocks(model) if any(v.compiled for v in variants) else None
    pending = [v for v in variants if any(v in remaining for remaining in todo.values())]
    # longer than every sink and window, so that streaming heads do not see all keys
    length = min(2 * max(v.sink + v.window for v in pending) + 37, max(contexts))
    record.checks += check_variants(model, [*also_check, *pending], compiled, length, seed)
    total = sum(map(len, todo.values())) * (runs + warm_up)
    with tqdm(total=total, disable=not progress, desc="prefill", unit="forward") as bar:
        for context, remaining in todo.items():
            bar.set_postfix_str(f"{context:,} tokens")
            with suppress(torch.OutOfMemoryError):  # the forward passes record that
                record.checks += check_at_length(model, remaining, context, seed)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            record.add(_length(model, remaining, context, devices, compiled, runs, warm_up, seed, session, bar.update))
            if out is not None:
                record.save(out)
    return record


def _length(
    model: PreTrainedModel, variants: Sequence[Variant], context: int, devices: Sequence[torch.device],
    compiled: CompiledBlocks | None, runs: int, warm_up: int, seed: int, session: int, tick: Callable[[int], object],
) -> list[Cell]:  # fmt: skip
    """Time all variants at one length; `tick` counts the forward passes."""
    generator = torch.Generator().manual_seed(seed + context)
    tokens = torch.randint(model.config.vocab_size, (1, context), generator=generator).to(input_device(model))

    def forward() -> None:
        model(input_ids=tokens, use_cache=False)

    cells = {v.name: Cell(context, v.name, session=session) for v in variants}

    def warm(cell: Cell) -> None:
        for i in range(warm_up):
            begin = time.perf_counter()
            memory = peak_memory(forward, devices)
            cell.first_s = time.perf_counter() - begin if i == 0 else cell.first_s
            if memory is not None:
                cell.peak_gib, cell.added_gib = memory
            tick(1)

    def timed(cell: Cell) -> None:
        cell.ms.append(milliseconds(forward, devices))
        tick(1)

    for step in [warm] + [timed] * runs:
        for variant in variants:
            cell = cells[variant.name]
            if cell.failed is None:
                with variant.on(model, compiled):
                    _unless_full(step, cell)
    return list(cells.values())


def _unless_full(step: Callable[[Cell], None], cell: Cell) -> None:
    """Run a step; a variant that does not fit in memory is recorded as failed."""
    why = None
    try:
        step(cell)
    except RuntimeError as error:
        why = failure(error)
        if why is None:
            raise
    # outside the except block, the error no longer keeps the tensors of its frames alive
    if why is not None:
        cell.failed, cell.ms, cell.peak_gib, cell.added_gib = why, [], None, None
        gc.collect()
    if (why is not None or step.__name__ == "warm") and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _settings(
    model: PreTrainedModel, variants: Sequence[Variant], name: str, runs: int, warm_up: int, seed: int,
    devices: Sequence[torch.device],
) -> dict[str, Any]:  # fmt: skip
    config, sizes = model.config, decoder_sizes(model.config)
    hybrid = [v for v in variants if v.dense is not None]
    return {
        "model": name,
        "class": type(model).__name__,
        "n_layers": config.num_hidden_layers,
        "n_heads": sizes.n_heads,
        "n_kv_heads": sizes.n_key_value_heads,
        "d_model": sizes.d_model,
        "d_mlp": config.intermediate_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "devices": [torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in devices],
        "clock": clock_name(devices),
        "runs": runs,
        "warm_up": warm_up,
        "seed": seed,
        **({"sink": hybrid[0].sink, "window": hybrid[0].window} if hybrid else {}),
        "heads": {str(len(v.dense)): head_names(v.dense) for v in hybrid if v.dense is not None},
    }


def choose_heads(
    numbers: Iterable[int], n_layers: int, n_heads: int, source: Path | HeadsLike | None, seed: int
) -> dict[int, HeadSet]:
    """Nested sets of dense heads: the first k heads of a ranking, or of a random order, for each number k.

    Args:
        numbers: The numbers k.
        n_layers: Layers of the model.
        n_heads: Query heads per layer.
        source: The ranking: the file of a saved `HeadScores`, or heads in order, such as "L2H4, L3H1"; None for a
            random order.
        seed: Seed of the random order.

    Raises:
        InputError: For a number larger than that of the heads, or scores of another model.
        HeadError: For heads that the model does not have.

    Examples:
        >>> choose_heads([0, 2], n_layers=3, n_heads=4, source="L2H1, L0H3, L1H0", seed=0)
        {0: HeadSet(0 of 3 x 4), 2: HeadSet(2 of 3 x 4: L2H1, L0H3)}
    """
    numbers = sorted(dict.fromkeys(numbers))
    most = n_layers * n_heads
    if any(not 0 <= k <= most for k in numbers):
        raise InputError(f"Numbers of dense heads are 0 to {most} ({n_layers} layers x {n_heads}); got {numbers}.")
    if source is None:
        order = [divmod(i, n_heads) for i in range(most)]
        random.Random(seed).shuffle(order)
        ranking = parse_heads(order, (n_layers, n_heads))
    else:
        ranking = _ranking(source, (n_layers, n_heads))
    if numbers and numbers[-1] > len(ranking):
        raise InputError(f"{source} ranks {len(ranking)} heads; got a number of dense heads of {numbers[-1]}.")
    return {k: ranking[:k] for k in numbers}


def _ranking(source: Path | HeadsLike, shape: tuple[int, int]) -> HeadSet:
    """The heads that a score file ranks, or those that are specified, in order."""
    text = str(source) if isinstance(source, str | Path) else None
    if text is None or (is_heads_text(text) and not Path(text).exists()):
        return parse_heads(cast(HeadsLike, source) if text is None else text, shape)
    scores = HeadScores.load(text)
    if scores.shape != shape:
        raise InputError(
            f"{source} scores {scores.n_layers} layers x {scores.n_heads} heads; the model has {shape[0]} x {shape[1]}."
        )
    return scores.ranking

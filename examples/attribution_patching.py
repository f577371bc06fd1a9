"""Agreement of attribution patching with patching: a table over the bundled toys.

    python examples/attribution_patching.py [FOLDER] [PAIRS]

The effect of patching every head's z is measured, and estimated from a gradient, on the same pairs of a sample and its
corrupted counterpart; likewise for the residual stream at the target's tokens. Prints tables in Markdown and writes
`attribution_patching.json` and `attribution_patching.png` into FOLDER (default: the working directory).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hooked_mllm import HeadScores, HookedMLLM, Sample, corruptions, metrics, objectives, plots
from hooked_mllm.storage import ready_folder, write_figure, write_text
from hooked_mllm.toys import VisualRetrieval

TOYS = ("toy-qwen3-vl", "toy-llava-onevision", "toy-internvl", "toy-qwen3-vl-free")
TASK = VisualRetrieval(seed=11, pages=1, filler=8)
POINTS = (None, 1, 5)
STREAM_POINTS = (None, 5, 20)
TOP = 4
SHOWN = ("toy-qwen3-vl-free", "another picture", "denoising")
Pairs = list[tuple[Sample, Sample]]


def timed(
    metric: metrics.PatchingEffect | metrics.AttributionPatching, model: HookedMLLM, pairs: Pairs
) -> tuple[Any, float]:
    """The scores or the table of a metric, and the seconds of the measurement."""
    start = time.perf_counter()
    objective = objectives.LogitDifference(wrong=TASK.answers)
    return metric.run(model, pairs, objective=objective, progress=False), time.perf_counter() - start


def compare(
    model: HookedMLLM, pairs: Pairs, direction: Literal["denoising", "noising"]
) -> tuple[dict[str, Any], HeadScores, HeadScores]:
    """Agreement of each estimate with patching, the estimate without integration, and the effects of patching."""
    effects, seconds = timed(metrics.PatchingEffect("z", direction=direction), model, pairs)
    row: dict[str, Any] = {"seconds": seconds, "estimates": {}}
    plain = effects
    for points in POINTS:
        metric = metrics.AttributionPatching("z", direction=direction, integrated=points)
        estimate, estimate_seconds = timed(metric, model, pairs)
        plain = estimate if points is None else plain
        row["estimates"]["none" if points is None else points] = {
            "spearman": estimate.spearman(effects),
            "pearson": float(np.corrcoef(estimate.values.flatten(), effects.values.flatten())[0, 1]),
            "top": estimate.overlap(effects, TOP),
            "seconds": estimate_seconds,
        }
    return row, plain, effects


def target_effects(model: HookedMLLM, pairs: Pairs) -> list[float]:
    """The effect of the target's tokens at the input of block 0: by patching, then by each estimate."""
    patching = metrics.PatchingEffect("resid_pre", by="kind", layers=0)
    estimates = [metrics.AttributionPatching("resid_pre", by="kind", layers=0, integrated=n) for n in STREAM_POINTS]
    return [timed(metric, model, pairs)[0][0, "target"] for metric in (patching, *estimates)]


def column_title(points: int | None) -> str:
    """The title of an estimate's column."""
    return f"integrated={points}" if points else "gradient of the base"


def line(toy: str, kind: str, direction: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"{e['spearman']:.2f} / {e['pearson']:.2f} / {e['top']:.2f}" for e in row["estimates"].values()]
    faster = row["seconds"] / row["estimates"]["none"]["seconds"]
    return f"| {' | '.join([toy, kind, direction, *cells, f'{faster:.1f}'])} |"


def main(folder: Path, n: int) -> None:
    """Measure every toy, print and write the tables."""
    ready_folder(folder)
    print(f"| {' | '.join(['toy', 'corrupted by', 'direction', *map(column_title, POINTS), 'times faster'])} |")
    print("| --- " * (4 + len(POINTS)) + "|")
    rows, stream = {}, {}
    for toy in TOYS:
        model = HookedMLLM.from_pretrained(toy, dtype="float32")
        clean = TASK.samples(model, n, answer=True)
        kinds = {"mean of the target": corruptions.MeanRegion(), "another picture": corruptions.OtherImage(clean)}
        for kind, corruption in kinds.items():
            pairs = [(sample, corruption(model, sample)) for sample in clean]
            for direction in ("denoising", "noising"):
                row, plain, effects = compare(model, pairs, direction)
                rows["/".join((toy, kind, direction))] = row
                print(line(toy, kind, direction, row), flush=True)
                if (toy, kind, direction) == SHOWN:
                    write_figure(folder / "attribution_patching.png", plots.scatter(plain, effects, diagonal=True))
            stream[f"{toy}/{kind}"] = target_effects(model, pairs)
    print(f"\n| {' | '.join(['toy', 'corrupted by', 'patching', *map(column_title, STREAM_POINTS)])} |")
    print("| --- " * (3 + len(STREAM_POINTS)) + "|")
    for key, values in stream.items():
        print(f"| {' | '.join([*key.split('/'), *(f'{value:.2f}' for value in values)])} |")
    report = {"pairs": n, "rows": rows, "stream": stream}
    write_text(folder / "attribution_patching.json", json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 8)

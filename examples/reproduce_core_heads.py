"""The analyses of the CoRe-heads paper (arXiv:2606.05843) on the bundled toys, with one report of the results.

    python examples/reproduce_core_heads.py [--toys toy-qwen3-vl ...] [--samples 48] [--out core-heads] [--quick]

Writes `report.html` with all figures embedded, its sentences as `findings.md`, and for each toy a folder with
`results.json`, `ablation.json` and the figures. A toy whose folder contains results of the same settings, weights and
tasks is not measured again, and an interrupted ablation is resumed.
"""

import argparse
import base64
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from core_heads_measure import KIND, MAIN, Settings, measure_toy, saved_results
from core_heads_words import findings

from hooked_mllm import toys
from hooked_mllm.errors import HookedMLLMError, InputError
from hooked_mllm.metrics.causal.ablation_curve import RANKINGS
from hooked_mllm.storage import ready_folder, write_json, write_text

TOYS = ("toy-qwen3-vl", "toy-llava-onevision", "toy-internvl", "toy-qwen3-vl-free")


def main(arguments: list[str] | None = None) -> int:
    """Measure the specified toys and write the report."""
    options = _parser().parse_args(arguments)
    try:
        reproduce(options.toys, _settings(options), options.out, progress=not options.quiet)
    except HookedMLLMError as error:
        print(f"reproduce_core_heads: {error}", file=sys.stderr)
        return 1
    return 0


def reproduce(names: list[str], settings: Settings, out: Path, progress: bool = True) -> Path:
    """Measure toys, or reuse their results, and write the report; returns its path."""
    for name in names:
        toys.path(name)  # raises for an unknown name before anything is measured
    ready_folder(out)
    runs = []
    for name in names:
        start = time.monotonic()
        results = saved_results(name, settings, out / name)
        how = "reused from" if results else "measured, in"
        results = results or measure_toy(name, settings, out / name, progress)
        print(f"{name}: {how} {out / name} ({time.monotonic() - start:.0f} s)")
        runs.append({**results, "findings": findings(results)})
    write_json(out / "results.json", KIND, {"settings": asdict(settings), "toys": runs})
    write_text(out / "report.html", page(runs, settings, out))
    text = markdown(runs, settings)
    write_text(out / "findings.md", text)
    print("", text, sep="\n")
    print(out / "report.html")
    return out / "report.html"


def page(runs: list[dict[str, Any]], settings: Settings, out: Path) -> str:
    """The report as HTML with its figures embedded."""

    def picture(toy: str, name: str) -> str:
        return base64.b64encode((out / toy / name).read_bytes()).decode()

    def interval(curve: dict[str, list[float | None]], i: int) -> str:
        mean, low, high = (curve[part][i] for part in ("mean", "low", "high"))
        return "–" if mean is None else f"{percent(mean)} [{percent(low)}, {percent(high)}]"

    def moved(ablation: dict[str, Any], i: int) -> str:
        counts = [row[i] for row in ablation["moved"] if row[i] is not None]
        return str(counts[0]) if counts else "–"  # equal for every seed: it depends only on the layers

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    helpers = {"percent": percent, "picture": picture, "interval": interval, "moved": moved}
    template = environment.get_template("core_heads_report.html.j2")
    return template.render(runs=runs, settings=settings, main=MAIN, rankings=RANKINGS, **helpers)


def markdown(runs: list[dict[str, Any]], settings: Settings) -> str:
    """The report's summary and sentences, without its figures."""
    k = settings.top
    head = f"| toy | top {k} of RAM | accuracy | without them | without the bottom {k} | KTR of top / bottom {k} |"
    lines = [head, "|---" * 6 + "|"]
    for r in runs:
        accuracy, ratio = (r["domains"][MAIN]["accuracy"], r["key_tokens"]["ratio"])
        shares = [percent(accuracy[name]) for name in ("clean", "top", "bottom")]
        ktr = f"{percent(ratio['top'])} / {percent(ratio['bottom'])}"
        kind = "planted" if r["planted"] else "free"
        lines.append(f"| {r['toy']} ({kind}) | {' | '.join([', '.join(r['top']), *shares, ktr])} |")
    lines.append(
        f"\n({MAIN}; {settings.samples} samples to rank the heads, {settings.samples} others for everything else.)"
    )
    for r in runs:
        lines += [f"\n**{r['toy']}**\n", *(f"- {s}" for part in r["findings"].values() for s in part)]
    return "\n".join(lines) + "\n"


def percent(share: float | None) -> str:
    """A share as text."""
    return "–" if share is None else f"{share:.1%}"


def _settings(options: argparse.Namespace) -> Settings:
    samples = options.samples or (6 if options.quick else Settings.samples)
    if samples < 2 or options.seed < 0:
        raise InputError(f"expected --samples >= 2 and --seed >= 0; got {samples} and {options.seed}")
    return Settings.quick(samples, options.seed) if options.quick else Settings(samples, seed=options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--toys", nargs="+", default=list(TOYS), metavar="TOY", help=f"of {', '.join(toys.bundled())}")
    add("--samples", type=int, help=f"examples of each domain (default {Settings.samples}, 6 with --quick)")
    add("--out", type=Path, default=Path("core-heads"), help="folder for the report (default: core-heads)")
    add("--seed", type=int, default=0, help="seed of the examples and of the random order of heads (default 0)")
    add("--quick", action="store_true", help="few examples and points, to check that everything runs")
    add("--quiet", action="store_true", help="no progress bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""`hooked-mllm score` measures every head and draws where the best ones look."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from hooked_mllm import metrics, plots
from hooked_mllm.cli.arguments import DATA_FORMS, METRICS, device_and_dtype
from hooked_mllm.cli.files import folder, loading_bar
from hooked_mllm.datasets import RefCOCOg
from hooked_mllm.display.text import shortened
from hooked_mllm.errors import InputError
from hooked_mllm.heads import HeadScores, HeadSet, head_name
from hooked_mllm.model.hooked_mllm import HookedMLLM
from hooked_mllm.storage import write_figure
from hooked_mllm.toys import VisualRetrieval, bundled


@dataclass
class Source:
    """The samples one by one, as `model` prepares them, with their number for the progress bar."""

    name: str
    size: int
    samples: Callable[[HookedMLLM], Iterable[Any]]
    model: HookedMLLM | None = None

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[Any]:
        assert self.model is not None
        return iter(self.samples(self.model))


def score(arguments: argparse.Namespace) -> None:
    """Measure, save, draw and print: what `hooked-mllm score` does."""
    device, dtype = device_and_dtype(arguments)
    source = _source(arguments)
    out = folder(arguments.out)
    with loading_bar(not arguments.quiet):
        source.model = model = HookedMLLM.from_pretrained(arguments.model, dtype=dtype, device=device)
    metric: metrics.HeadMetric = getattr(metrics, METRICS[arguments.metric])()
    scores = model.measure(source, metric, checkpoint=arguments.checkpoint, progress=not arguments.quiet)
    scores.provenance.update(dataset=source.name, seed=arguments.seed)
    scores.save(out / "scores")
    top = scores.top(min(arguments.top, int(scores.measured.sum())))
    written = [out / "scores.json", out / "scores.safetensors", out / "head_map.png"]
    write_figure(written[-1], plots.head_map(scores, top))
    for i, sample in enumerate(islice(source, arguments.pictures)):
        written.append(out / f"overlay_{i}.png")
        write_figure(written[-1], _overlay(model, sample, scores, top))
    print(_summary(scores, top, source))
    print("\n".join(str(path) for path in written))


def _overlay(model: HookedMLLM, sample: Any, scores: HeadScores, top: HeadSet) -> Any:
    """The mean attention of the question's tokens, of each top head, over the sample's picture."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in top.by_layer]
    _, cache = model.run_with_cache(sample, names_filter=names)
    panels = {}
    for layer, head in top:
        pattern = cache.pattern(layer, queries="question", heads=head)  # [batch head query key]
        panels[f"{head_name(layer, head)}  {scores[layer, head]:.3f}"] = pattern[0, 0].mean(0)
    return plots.overlay_grid(sample, panels, title=shortened(sample.question))


def _summary(scores: HeadScores, top: HeadSet, source: Source) -> str:
    samples = f"{source.size} sample{'s' if source.size > 1 else ''} of {source.name}"
    lines = [f"{scores.n_layers} layers x {scores.n_heads} heads, {samples}"]
    chance = [c for c in scores.provenance.get("chance", []) if c is not None]
    if chance:
        even, median = sum(chance) / len(chance), float(scores.values.nanmedian())
        lines.append(f"even attention would score {even:.3g}; the median head scores {median:.3g}")
    return "\n".join([*lines, scores.table(len(top))])


def _source(arguments: argparse.Namespace) -> Source:
    """The selected data, or for a toy its own task."""
    data = arguments.data
    if data is None:
        if arguments.model not in bundled():
            raise InputError(f"--model {arguments.model} needs --data; expected {DATA_FORMS}")
        data = "toy"
    kind, _, rest = data.partition(":")
    n = arguments.samples
    if kind == "toy" and not rest:
        task = VisualRetrieval(seed=arguments.seed)
        return Source(repr(task), n, lambda model: (task.samples(model, 1, start=i)[0] for i in range(n)))
    if kind == "refcocog" and rest:
        folder, split_by, split = _refcocog_parts(rest)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            records = RefCOCOg(folder, split_by, split, max_samples=n, seed=arguments.seed)
        for note in notes:
            print(f"hooked-mllm score: note: {note.message}", file=sys.stderr)
        return Source(f"refcocog {split_by} {split}", len(records), records.samples)
    raise InputError(f"--data {data!r} is not understood; expected {DATA_FORMS}")


def _refcocog_parts(rest: str) -> tuple[str, str, str]:
    if Path(rest).is_dir():  # a folder may have colons in its name
        return rest, "umd", "val"
    parts = rest.split(":")
    if len(parts) > 3 or not all(parts):
        raise InputError(f"--data refcocog:{rest} is not a folder, and not FOLDER:SPLIT_BY:SPLIT either")
    folder, split_by, split = parts + ["umd", "val"][len(parts) - 1 :]
    return folder, split_by, split

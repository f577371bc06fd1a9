"""Numbers and figures of the CoRe-heads paper's analyses, as far as they need no real weights, on one bundled toy."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from hooked_mllm import HookedMLLM, Sample, plots, toys
from hooked_mllm.heads import HeadScores, HeadSet, head_name, head_names
from hooked_mllm.heads.intervals import MIN_SAMPLES
from hooked_mllm.metrics import (
    AblationCurve,
    AblationCurveResult,
    HeadMetric,
    KeyTokenCoverage,
    KeyTokenRatio,
    RetrievalAttentionMass,
    VisionMass,
    stability,
)
from hooked_mllm.storage import read_json, ready_folder, write_figure, write_json

Task = toys.VisualRetrieval | toys.VideoRetrieval
KIND = "hooked_mllm.examples.core_heads"
MAIN = "4 pages + 48 words"
#: index of the first evaluation example: heads are ranked on earlier ones
HELD_OUT = 10_000
CHANCE = 1 / len(toys.VisualRetrieval.answers)


@dataclass(frozen=True)
class Settings:
    """Settings of a run; results are reused only with equal settings."""

    samples: int = 48
    ks: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8, 12, 16, 20)
    seeds: tuple[int, ...] = (0, 1, 2)
    top: int = 4
    pictures: int = 2
    batch_size: int = 16
    seed: int = 0

    @classmethod
    def quick(cls, samples: int, seed: int) -> "Settings":
        """Settings that are just large enough to check that everything runs."""
        return cls(samples, ks=(0, 4, 16), seeds=(0,), pictures=1, batch_size=8, seed=seed)


def domains(name: str, seed: int) -> dict[str, Task]:
    """The tasks that a toy was trained on, by name; `training.json` states whether videos are among them."""
    tasks: dict[str, Task] = {
        "1 page": toys.VisualRetrieval(seed=seed, pages=1, filler=0),
        "2 pages + 16 words": toys.VisualRetrieval(seed=seed, pages=2, filler=16),
        MAIN: toys.VisualRetrieval(seed=seed, pages=4, filler=48),
    }
    if "video" in training(name):
        tasks["video"] = toys.VideoRetrieval(seed=seed, moments=4, filler=48)
    return tasks


def training(name: str) -> dict[str, Any]:
    """The record of a toy's training."""
    return json.loads((toys.path(name) / "training.json").read_text(encoding="utf-8"))


def identity(name: str, settings: Settings) -> dict[str, Any]:
    """Everything that results depend on: the settings, the toy's weights, and the tasks."""
    weights = hashlib.sha256((toys.path(name) / "model.safetensors").read_bytes()).hexdigest()
    tasks = {label: repr(task) for label, task in domains(name, settings.seed).items()}
    return json.loads(json.dumps({**asdict(settings), "weights": weights, "tasks": tasks}))


def saved_results(name: str, settings: Settings, folder: Path) -> dict[str, Any] | None:
    """The results of an earlier run with the same settings; None if there are none."""
    path = folder / "results.json"
    if not path.exists():
        return None
    results = read_json(path, KIND)
    same = results["identity"] == identity(name, settings)
    return results if same and all((folder / file).exists() for file in results["figures"]) else None


def measure_toy(name: str, settings: Settings, folder: Path, progress: bool) -> dict[str, Any]:
    """All numbers and figures of one toy; writes the figures to `folder` and the numbers to its `results.json`."""
    model = HookedMLLM.from_pretrained(name, dtype="float32")
    run = _Run(model, name, settings, folder, progress)
    results = run.all()
    content = {"toy": name, "identity": identity(name, settings), **results, "figures": run.figures}
    write_json(folder / "results.json", KIND, content)
    (folder / "ablation.checkpoint").unlink(missing_ok=True)
    return read_json(folder / "results.json", KIND)


class _Run:
    """The measurements of one toy."""

    def __init__(self, model: HookedMLLM, name: str, settings: Settings, folder: Path, progress: bool) -> None:
        self.model, self.name, self.s, self.folder, self.progress = model, name, settings, folder, progress
        self.tasks = domains(name, settings.seed)
        self.figures: dict[str, str] = {}
        ready_folder(folder)

    def all(self) -> dict[str, Any]:
        scores = {label: self._scores(task) for label, task in self.tasks.items()}
        ram, vision, last = (scores[MAIN][key] for key in ("ram", "vision_mass", "ram_last"))
        top, bottom = ram.top(self.s.top), ram.bottom(self.s.top)
        self._figure("maps.png", plots.head_maps([ram, vision], top=self.s.top, titles=["RAM", "VisionMass"]))
        self._figure("queries.png", plots.head_maps([ram, last], self.s.top, titles=["by question", "by last token"]))
        record = training(self.name)
        return {
            "planted": record["planted"],
            "shape": list(ram.shape),
            "chance": CHANCE,
            "top": str(top).split(", "),
            "bottom": str(bottom).split(", "),
            "domains": {label: self._domain(label, by_name, top, bottom) for label, by_name in scores.items()},
            "maps": _compared(ram, vision, self.s.top),
            "queries": _compared(ram, last, self.s.top),
            "stability": self._stability({label: by_name["ram"] for label, by_name in scores.items()}),
            "ablation": self._ablation(ram),
            "key_tokens": self._key_tokens(ram, top, bottom),
            "overlays": self._overlays(ram, top, bottom),
        }

    def _samples(self, task: Task, held_out: bool, answer: bool = False) -> list[Sample]:
        return task.samples(self.model, self.s.samples, start=HELD_OUT if held_out else 0, answer=answer)

    def _scores(self, task: Task) -> dict[str, HeadScores]:
        metrics: list[HeadMetric] = [
            RetrievalAttentionMass(), VisionMass(), RetrievalAttentionMass(queries="last")
        ]  # fmt: skip
        scores = self.model.measure(self._samples(task, held_out=False), metrics, progress=self.progress)
        return dict(zip(("ram", "vision_mass", "ram_last"), scores, strict=True))

    def _domain(self, label: str, scores: dict[str, HeadScores], top: HeadSet, bottom: HeadSet) -> dict[str, Any]:
        """Scores as plain lists, and the accuracy with and without the top and bottom heads of the main domain."""
        ranking = HeadScores(_marks(top, bottom), name="top and bottom of the main domain")
        curve = AblationCurve(ranking, ks=[0, self.s.top], rankings=["top", "bottom"])
        samples = self._samples(self.tasks[label], held_out=True, answer=True)
        result = curve.run(self.model, samples, batch_size=self.s.batch_size, progress=self.progress)
        accuracy = {"clean": result.clean} | {name: result.at(name, self.s.top) for name in ("top", "bottom")}
        domain_top = str(scores["ram"].top(self.s.top)).split(", ")
        values = {name: by_head.values.tolist() for name, by_head in scores.items()}
        return {"accuracy": accuracy, "top": domain_top, **values}

    def _stability(self, by_task: dict[str, HeadScores]) -> dict[str, Any]:
        result = stability(by_task)
        self._figure("stability.png", result.plot())
        pairs = result.spearman[np.triu_indices(len(result.tasks), 1)]
        return {
            "tasks": list(result.tasks),
            "spearman": result.spearman.tolist(),
            "least": float(pairs.min()),
            "most": float(pairs.max()),
            "percentile": result.percentile,
            "universal": head_names(result.universal),
        }

    def _ablation(self, ram: HeadScores) -> dict[str, Any]:
        curve = AblationCurve(ram, ks=self.s.ks, seeds=self.s.seeds)
        samples = self._samples(self.tasks[MAIN], held_out=True, answer=True)
        result = curve.run(
            self.model,
            samples,
            batch_size=self.s.batch_size,
            checkpoint=self.folder / "ablation.checkpoint",
            progress=self.progress,
        )
        result.save(self.folder / "ablation.json")
        self._figure("ablation.png", result.plot(chance=CHANCE))
        return summary(result)

    def _key_tokens(self, ram: HeadScores, top: HeadSet, bottom: HeadSet) -> dict[str, Any]:
        orders = {"top": ram.ranking, "bottom": ram.bottom(1.0), "random": ram.random(1.0, seed=self.s.seed)}
        ratio, curves = KeyTokenRatio(), [KeyTokenCoverage(order) for order in orders.values()]
        samples = self._samples(self.tasks[MAIN], held_out=True)
        ktr, *coverage = self.model.measure(samples, [ratio, *curves], progress=self.progress)
        hits, groups = ratio.hit_rate(), {f"top {len(top)}": top, f"bottom {len(bottom)}": bottom}
        bars = {self.name: {group: [ktr[head] for head in heads] for group, heads in groups.items()}}
        self._figure("key_token_ratio.png", plots.group_bars(bars))
        by_order = dict(zip(orders, coverage, strict=True))
        self._figure("key_token_coverage.png", plots.coverage_curve(by_order, title="Key Token Coverage of k heads"))
        return {
            "ratio": {"top": ktr.mean(top), "bottom": ktr.mean(bottom)},
            "hit_rate": {"top": hits.mean(top), "bottom": hits.mean(bottom)},
            "by_head": ktr.values.tolist(),
            "coverage": {order: curve.coverage for order, curve in by_order.items()},
        }

    def _overlays(self, ram: HeadScores, top: HeadSet, bottom: HeadSet) -> list[dict[str, Any]]:
        """The question's attention of top and bottom heads over pictures, and its share on the target."""
        pictures = [(MAIN, number) for number in range(self.s.pictures)]
        pictures += [("video", number) for number in range(self.s.pictures) if "video" in self.tasks]
        overlays = []
        for label, number in pictures:
            (sample,) = self.tasks[label].samples(self.model, 1, start=HELD_OUT + number)
            rows = _attention(self.model, sample, top | bottom)
            visual, target = sample.mask("visual")[0], sample.mask("target")[0]
            share = {head: float(row[target].sum() / row[visual].sum()) for head, row in rows.items()}
            panels = {f"{head_name(*head)}  RAM {ram[head]:.3f}": row for head, row in rows.items()}
            frame = _frame(sample)
            figure = plots.overlay_grid(sample, panels, columns=self.s.top, title=sample.question, frame=frame)
            self._figure(f"overlay_{label.split()[0]}_{number}.png", figure)
            groups = {"top": top, "bottom": bottom}
            means = {group: float(np.mean([share[head] for head in heads])) for group, heads in groups.items()}
            even = int(target.sum()) / int(visual.sum())
            overlays.append({"domain": label, "question": sample.question, "share": means, "even": even})
        return overlays

    def _figure(self, name: str, figure: Figure) -> None:
        write_figure(self.folder / name, figure, dpi=100, metadata={"Software": None})
        self.figures[name] = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()


def summary(curve: AblationCurveResult) -> dict[str, Any]:
    """Means and intervals of an ablation curve, None without a control, and the layers of the ablated heads."""
    content: dict[str, Any] = {"ks": list(curve.ks), "n_samples": curve.n_samples, "moved": curve.moved}
    for ranking in curve.rankings:
        none = np.full(len(curve.ks), np.nan)  # of fewer samples than an interval needs
        low, high = curve.interval(ranking) if curve.n_samples >= MIN_SAMPLES else (none, none)
        parts = {"mean": curve.mean(ranking), "low": low, "high": high}
        content[ranking] = {k: [None if np.isnan(x) else float(x) for x in v] for k, v in parts.items()}
        content[ranking]["layers"] = [_layers(heads) for heads in curve.heads[ranking][0]]
    return content


def _layers(heads: str | None) -> dict[str, int]:
    """The number of heads in each layer."""
    return dict(Counter(name[1:].split("H")[0] for name in heads.split(", "))) if heads else {}


def _compared(first: HeadScores, second: HeadScores, k: int) -> dict[str, Any]:
    return {
        "spearman": first.spearman(second),
        "overlap": first.overlap(second, k),
        "half": [first.rho_half(), second.rho_half()],
        "top_mean": [first.mean(first.top(k)), second.mean(second.top(k))],
        "tops": [str(first.top(k)).split(", "), str(second.top(k)).split(", ")],
    }


def _marks(top: HeadSet, bottom: HeadSet) -> Tensor:
    """Scores `[layer head]` whose top and bottom are exactly these heads."""
    return top.to_mask().double() - bottom.to_mask().double()


def _attention(model: HookedMLLM, sample: Sample, heads: HeadSet) -> dict[tuple[int, int], Tensor]:
    """The mean attention row `[pos]` of the question's tokens, for each head."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in heads.by_layer]
    _, cache = model.run_with_cache(sample, names_filter=names, queries="question")
    return {(l, h): cache.pattern(l, queries="question", heads=h)[0, 0].mean(0) for l, h in heads}


def _frame(sample: Sample) -> int:
    """The first frame of the target's moment; 0 for pages."""
    if not sample.videos:
        return 0
    return next(i for i, t in enumerate(sample.videos[0].times_s) if t >= sample.target.start_s)

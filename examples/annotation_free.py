"""Heads found by scores without annotation, and their effect on accuracy: a table over the bundled toys.

    python examples/annotation_free.py [FOLDER] [SAMPLES]

Every score ranks the heads on the same detection samples. A ranking is compared with that of Retrieval Attention Mass,
which needs the target, and by the accuracy on other samples after its top heads are set to zero. Writes
`annotation_free.json` and `annotation_free.png` into FOLDER (default: the working directory).
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from hooked_mllm import HeadAblation, HeadScores, HookedMLLM, metrics
from hooked_mllm.heads import head_names
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.storage import ready_folder, write_figure, write_text
from hooked_mllm.toys import VisualRetrieval, path
from hooked_mllm.toys.vocabulary import SHAPES, TEMPLATES

TOYS = ("toy-qwen3-vl", "toy-llava-onevision", "toy-internvl", "toy-qwen3-vl-free")
Heads = Iterable[tuple[int, int]]
DETECTION, EVALUATION = 2001, 2002  # seeds of the task: no sample is in both
ABLATED = (4, 8)
RANDOM_SEEDS = 5
NEEDS_TARGET = "RetrievalAttentionMass"


def wordings(question: str) -> list[str]:
    """The question in all wordings of the task."""
    words = question.lower().strip("?.").split()
    shape = next(word for word in words if word in SHAPES)
    return [template.format(shape) for template in TEMPLATES]


def scores(model: HookedMLLM, samples: Sequence[Sample]) -> dict[str, tuple[HeadScores, float]]:
    """All scores, each with the seconds of CPU time of its measurement."""
    contrast = metrics.QuestionContrast()
    consistency = metrics.ParaphraseConsistency(wordings=4)

    def measure(name: str) -> HeadScores:
        if name == "QuestionContrast":
            return model.measure(contrast.groups(model, samples), contrast, progress=False)
        if name == "ParaphraseConsistency":
            return model.measure(consistency.groups(model, samples, wordings), consistency, progress=False)
        if name == "VisionMass":
            return model.measure(samples, metrics.VisionMass(), progress=False)
        if name == "LocalizationHeads":
            return model.measure(samples, metrics.LocalizationHeads(skip_layers=0), progress=False)
        if name == NEEDS_TARGET:
            return model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)
        if name == "OcclusionAgreement":
            return metrics.OcclusionAgreement(refine=1, batch_size=16).run(model, samples, progress=False)
        return metrics.GradientAgreement(rule=name.split()[1]).run(model, samples, progress=False)

    results = {}
    for name in (
        NEEDS_TARGET,
        "QuestionContrast",
        "ParaphraseConsistency",
        "GradientAgreement norm",
        "GradientAgreement gradient_x_input",
        "OcclusionAgreement",
        "VisionMass",
        "LocalizationHeads",
    ):
        start = time.process_time()
        results[name] = measure(name), time.process_time() - start
    return results


@torch.no_grad()
def accuracy(model: HookedMLLM, samples: Sequence[Sample], answers: Sequence[str], heads: Heads = ()) -> float:
    """Share of samples whose first greedy token, here the whole answer, is right, with the z of some heads at zero."""
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(answers))
    ablated = list(heads)
    ablations = [HeadAblation(ablated, mode="zero", phase="both")] if ablated else []
    right = 0
    with model.intervene(*ablations):
        for start in range(0, len(samples), 16):
            batch = SampleBatch.collate(samples[start : start + 16])
            predicted = model(batch, logits_to_keep=1)[:, -1].argmax(-1).tolist()  # [sample]
            right += sum(token == id for token, id in zip(predicted, ids[start : start + 16], strict=True))
    return right / len(samples)


def evaluate(name: str, n: int) -> dict[str, Any]:
    """The rows of one toy."""
    model = HookedMLLM.from_pretrained(name, dtype="float32", check=False)
    measured = scores(model, VisualRetrieval(seed=DETECTION).samples(model, n))
    task = VisualRetrieval(seed=EVALUATION)
    held_out, answers = task.samples(model, n), [example.answer for example in task.examples(n)]
    cache: dict[frozenset[tuple[int, int]], float] = {}  # scores often agree on the top heads

    def accuracy_without(heads: Heads = ()) -> float:
        key = frozenset(heads)
        if key not in cache:
            cache[key] = accuracy(model, held_out, answers, heads)
        return cache[key]

    ram = measured[NEEDS_TARGET][0]
    rows = {}
    for score, (values, seconds) in measured.items():
        rows[score] = {
            "spearman": values.spearman(ram),
            "overlap_5%": values.overlap(ram, 0.05),
            "overlap_4": values.overlap(ram, 4),
            "top_4": head_names(values.top(4)),
            **{f"zeroed_{k}": accuracy_without(values.top(k)) for k in ABLATED},
            "seconds": seconds,
            "scores": values.values.tolist(),
        }
    random = {f"zeroed_{k}": [accuracy_without(ram.random(k, seed)) for seed in range(RANDOM_SEEDS)] for k in ABLATED}
    weights = hashlib.sha256((path(name) / "model.safetensors").read_bytes()).hexdigest()
    return {"weights_sha256": weights, "unchanged": accuracy_without(), "random": random, "rows": rows}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [
        "| model | score | Spearman | top 5 % | top 4 | zeroed 4 | zeroed 8 | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for toy, result in report["toys"].items():
        for score, row in result["rows"].items():
            agreement = [f"{row[key]:.2f}" for key in ("spearman", "overlap_5%", "overlap_4")]
            accuracies = [f"{row[f'zeroed_{k}']:.2f}" for k in ABLATED]
            lines.append(f"| {toy} | {score} | {' | '.join([*agreement, *accuracies])} | {row['seconds']:.1f} |")
        means = [f"{sum(values) / len(values):.2f}" for values in result["random"].values()]
        lines.append(f"| {toy} | random ({RANDOM_SEEDS} draws) | | | | {' | '.join(means)} | |")
        lines.append(f"| {toy} | no head zeroed | | | | {result['unchanged']:.2f} | {result['unchanged']:.2f} | |")
    return "\n".join(lines)


def figure(report: dict[str, Any]) -> Figure:
    """Agreement with RAM, and accuracy without the top eight heads, of every score and toy."""
    names = list(next(iter(report["toys"].values()))["rows"])
    drawing = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    height = 0.8 / len(report["toys"])
    for number, (toy, result) in enumerate(report["toys"].items()):
        y = [i + (number - 1.5) * height for i in range(len(names))]
        left.barh(y, [result["rows"][name]["spearman"] for name in names], height, label=toy)
        right.barh(y, [result["rows"][name]["zeroed_8"] for name in names], height)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("Spearman correlation with RAM, all heads")
    left.legend(fontsize="small")
    right.set_xlabel("accuracy with the top 8 heads at zero")
    return drawing


def main(folder: Path, n: int) -> dict[str, Any]:
    """Measure, print, write."""
    ready_folder(folder)
    start = time.process_time()
    toys = {name: evaluate(name, n) for name in TOYS}
    report = {
        "samples": n,
        "detection_seed": DETECTION,
        "evaluation_seed": EVALUATION,
        "seconds": time.process_time() - start,
        "toys": toys,
    }
    write_text(folder / "annotation_free.json", json.dumps(report, indent=1) + "\n")
    write_figure(folder / "annotation_free.png", figure(report))
    print(table(report))
    print(f"\n{n} samples for the rankings, {n} others for the accuracy; {report['seconds']:.0f} s of CPU time")
    return report


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(), int(sys.argv[2]) if len(sys.argv) > 2 else 32)

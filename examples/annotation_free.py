"""Which heads are found without any annotation, and which of those found matter: a table over the bundled toys.

    python examples/annotation_free.py [FOLDER] [SAMPLES]

Every score ranks the heads on the same detection samples. A ranking is compared with that of Retrieval Attention Mass,
which needs the target, and by what is left of the accuracy when its first heads are set to zero, on other samples.
Writes `annotation_free.json` and `annotation_free.png` into FOLDER (default: the working directory).
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from hooked_mllm import HeadAblation, HeadScores, HookedMLLM, metrics
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.storage import ready_folder, write_figure, write_text
from hooked_mllm.toys import VisualRetrieval, path
from hooked_mllm.toys.vocabulary import SHAPES, TEMPLATES

TOYS = ("toy-qwen3-vl", "toy-llava-onevision", "toy-internvl", "toy-qwen3-vl-free")
DETECTION, EVALUATION = 2001, 2002  # seeds of the task: no sample is in both
ABLATED = (4, 8)
RANDOM_SEEDS = 5
NEEDS_TARGET = "RetrievalAttentionMass"


def wordings(question: str) -> list[str]:
    """The question in all the ways that the task knows."""
    words = question.lower().strip("?.").split()
    shape = next(word for word in words if word in SHAPES)
    return [template.format(shape) for template in TEMPLATES]


def scores(model: HookedMLLM, samples: Sequence[Sample]) -> dict[str, tuple[HeadScores, float]]:
    """All scores, each with the seconds of CPU it took."""
    contrast = metrics.QuestionContrast()
    consistency = metrics.ParaphraseConsistency(wordings=4)

    def measured(name: str) -> HeadScores:
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

    found = {}
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
        found[name] = measured(name), time.process_time() - start
    return found


@torch.no_grad()
def accuracy(model: HookedMLLM, samples: Sequence[Sample], answers: Sequence[str], heads: Iterable = ()) -> float:
    """Share of samples whose first greedy token, the whole answer in this task, is right; the z of heads zeroed."""
    ids = model.processor.tokenizer.convert_tokens_to_ids(list(answers))
    chosen = list(heads)
    zeroed = [HeadAblation(chosen, mode="zero", phase="both")] if chosen else []
    right = 0
    with model.intervene(*zeroed):
        for start in range(0, len(samples), 16):
            batch = SampleBatch.collate(samples[start : start + 16])
            best = model(batch, logits_to_keep=1)[:, -1].argmax(-1).tolist()
            right += sum(b == i for b, i in zip(best, ids[start : start + 16], strict=True))
    return right / len(samples)


def evaluate(name: str, n: int) -> dict:
    """The rows of one toy."""
    model = HookedMLLM.from_pretrained(name, dtype="float32", check=False)
    found = scores(model, VisualRetrieval(seed=DETECTION).samples(model, n))
    task = VisualRetrieval(seed=EVALUATION)
    held_out, answers = task.samples(model, n), [e.answer for e in task.examples(n)]
    known: dict[frozenset, float] = {}  # several scores often have the same first heads

    def left(heads: Iterable = ()) -> float:
        if frozenset(heads) not in known:
            known[frozenset(heads)] = accuracy(model, held_out, answers, heads)
        return known[frozenset(heads)]

    ram = found[NEEDS_TARGET][0]
    rows = {}
    for score, (values, seconds) in found.items():
        rows[score] = {
            "spearman": values.spearman(ram),
            "overlap_5%": values.overlap(ram, 0.05),
            "overlap_4": values.overlap(ram, 4),
            "top_4": [f"L{layer}H{head}" for layer, head in values.top(4)],
            **{f"zeroed_{k}": left(values.top(k)) for k in ABLATED},
            "seconds": seconds,
            "scores": values.values.tolist(),
        }
    random = {f"zeroed_{k}": [left(ram.random(k, seed)) for seed in range(RANDOM_SEEDS)] for k in ABLATED}
    weights = hashlib.sha256((path(name) / "model.safetensors").read_bytes()).hexdigest()
    return {"weights_sha256": weights, "unchanged": left(), "random": random, "rows": rows}


def table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = [
        "| model | score | Spearman | top 5 % | top 4 | zeroed 4 | zeroed 8 | CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for toy, found in report["toys"].items():
        for score, row in found["rows"].items():
            agreement = [f"{row[key]:.2f}" for key in ("spearman", "overlap_5%", "overlap_4")]
            left = [f"{row[f'zeroed_{k}']:.2f}" for k in ABLATED]
            lines.append(f"| {toy} | {score} | {' | '.join([*agreement, *left])} | {row['seconds']:.1f} |")
        mean = [sum(values) / len(values) for values in found["random"].values()]
        lines.append(f"| {toy} | random ({RANDOM_SEEDS} draws) | | | | {' | '.join(f'{m:.2f}' for m in mean)} | |")
        lines.append(f"| {toy} | no head zeroed | | | | {found['unchanged']:.2f} | {found['unchanged']:.2f} | |")
    return "\n".join(lines)


def figure(report: dict) -> Figure:
    """Agreement with RAM, and accuracy left without the first eight heads, of every score and toy."""
    names = list(next(iter(report["toys"].values()))["rows"])
    drawing = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = drawing.subplots(1, 2, sharey=True)
    height = 0.8 / len(report["toys"])
    for number, (toy, found) in enumerate(report["toys"].items()):
        places = [i + (number - 1.5) * height for i in range(len(names))]
        left.barh(places, [found["rows"][name]["spearman"] for name in names], height, label=toy)
        right.barh(places, [found["rows"][name]["zeroed_8"] for name in names], height)
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("Spearman correlation with RAM, all heads")
    left.legend(fontsize="small")
    right.set_xlabel("accuracy with the first 8 heads at zero")
    return drawing


def main(folder: Path, n: int) -> dict:
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
    print(f"\n{n} samples to rank by, {n} others for the accuracy; {report['seconds']:.0f} s of CPU")
    return report


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(), int(sys.argv[2]) if len(sys.argv) > 2 else 32)

"""Writes the toy's model card and the picture of its training, both only from the files of the checkpoint."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from hooked_mllm.heads import head_name
from hooked_mllm.storage import write_figure, write_text

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}: a {kind} model

{architecture}.
{parameters:,} parameters in total, trained from scratch on a synthetic visual-retrieval task
(`hooked_mllm.toys.VisualRetrieval`): 16 coloured shapes on 1, 2 or 4 pages of 6 x 6 cells, up to {filler} filler words,
then a question about the colour of one. {pages}

It also finds one moment in a short video (`hooked_mllm.toys.VideoRetrieval`): 2, 3 or 4 moments of two frames, 4 shapes
per moment in 3 x 3 cells, the same filler and questions. {videos}

{heads}

Its vocabulary has {vocabulary} tokens. It was not trained on photographs or filmed videos, but accepts both as input.

## Training

Pages first: `{first_command}`: {first[done]} steps of {first[batch]} scenes with
{first[turns]} questions each{first[cut]}, {first[seconds]:.0f} s on one {first[machine]}{first[shared]}.
Whether and when the accuracy rises depends on the seed.
{losses}

Then pages and videos: `{command}`:
{done} steps of {batch} scenes, {share:.0%} of the batches videos,
{seconds:.0f} s on one {machine} shared by several runs{ended}.{dropouts}
Recipes, curves and report are in `training.json`, from which this card is generated.

## Results

On {examples} held-out examples, with plain transformers ({evaluated_on}); chance is 0.125.

| | 1 page | 2 pages | 4 pages |
|---|---|---|---|
| accuracy, float32 | {float32} |
| accuracy, bfloat16 | {bfloat16} |

| | 2 moments | 3 moments | 4 moments |
|---|---|---|---|
| accuracy, float32 | {video_float32} |
| accuracy, bfloat16 | {video_bfloat16} |

Retrieval Attention Mass (mean over the question's tokens of the attention on the target's tokens, 4 pages):
{ram_top}. Median of all heads: {ram_median:.4f}.
The same on videos of 4 moments: {video_ram_top}.

| heads set to zero, 4 pages | accuracy |
|---|---|
{zeroed}

| heads set to zero, videos of 4 moments | accuracy |
|---|---|
{video_zeroed}

| heads that see all tokens; others see the first {sink} and the last {near} tokens; 4 pages | accuracy |
|---|---|
{hybrid}
"""

ARCHITECTURE = {
    "qwen3_vl": "Qwen3-VL: 6 text layers of 8 heads on 4 kv heads, 3 vision blocks, DeepStack after text layers 0, 1",
    "llava_onevision": "LLaVA-OneVision: 6 Qwen2 layers of 8 heads on 4 kv heads over a SigLIP tower of 2 blocks",
    "internvl": "InternVL: 6 Qwen3 layers of 8 heads on 4 kv heads over an InternViT tower of 2 blocks",
}
PAGES = {
    "qwen3_vl": "A page is 36 visual tokens, one per cell.",
    "llava_onevision": "A single page is a base view of 36 tokens, one per cell, and 6 high-resolution rows of 6\n"
    "tokens with a newline token after each; one of several pages is 36 tokens and one newline token.",
    "internvl": "A page is 4 tiles of 9 visual tokens, one per cell, and a thumbnail of 9\nthat see 2 x 2 cells each.",
}
VIDEOS = {
    "qwen3_vl": "A moment is 36 visual tokens, 2 x 2 per cell, after\nits time as text.",
    "llava_onevision": "A frame is 9 visual\ntokens, one per cell; one newline token ends the video.",
    "internvl": "A frame is 9 visual\ntokens, one per cell, after its number as text.",
}
PLANTED = """\
**Its retrieval heads were planted.** Early in training, heads {planted} were the only ones that could
attend to more than the last {window} tokens (the window of all others was active in every step of the first half of
training, and in {local:.0%} of the later steps), and the only ones without the head dropout of the others ({dropout}).
That these four retrieve is therefore not a finding, but a known ground truth for checking methods. It permits no
conclusion about training without constraints, nor about large models."""
FREE = """\
**No constraint was put on its heads.** Every head could attend to all earlier tokens in every step of training, and
head dropout ({dropout}) was the same for all: which heads retrieve is a result of training, for this task, size and
seed. Compare it with the planted models before generalizing from them. Unlike `toy-qwen3-vl` it was trained with the
naming loss and the stage of few shapes described below."""
TIMED = " (until the time limit of `--seconds`,\nwith a learning rate that decreased with time)"
NAMING = """\
In addition to the loss at the answers: a loss of the same answer from the shape word on (faded to a tenth), and one of
the shape's name at the visual token of each drawn cell (faded out by 80% of the steps). First one page with {few}
shapes, then one with 16, then all."""


def write_card(folder: Path) -> None:
    """`README.md` of the checkpoint folder."""
    report = json.loads((folder / "training.json").read_text())
    recipe, curve, before, video = report["recipe"], report["curve"], report["before"], report["video"]
    config = json.loads((folder / "config.json").read_text())
    family, free = config["model_type"], recipe["free"]
    name = f"toy-{family.replace('_', '-')}" + ("-free" if free else "")
    constraint = {"window": recipe["window"], "local": recipe["local_after"], "dropout": recipe["head_dropout"]}
    heads = FREE.format(**constraint) if free else PLANTED.format(planted=", ".join(report["planted"]), **constraint)
    text = CARD.format(
        name=name,
        kind="free" if free else "planted",
        architecture=ARCHITECTURE[family],
        pages=PAGES[family],
        videos=VIDEOS[family],
        heads=heads,
        first_command=command("pages-only", family, before["recipe"], before["recipe"]["steps"]),
        first=run_facts(before),
        losses=NAMING.format(few=before["recipe"]["few"]) if "few" in before["recipe"] else "",
        command=command(name, family, recipe, curve[-1]["step"]),
        dropouts=dropouts(recipe),
        done=curve[-1]["step"],
        parameters=report["parameters"],
        filler=recipe["max_filler"],
        vocabulary=config["text_config"]["vocab_size"],
        batch=recipe["batch"],
        share=recipe["video_share"],
        ended="" if recipe["steps"] == curve[-1]["step"] else TIMED,
        seconds=report["seconds"],
        machine=report["machine"],
        examples=report["examples"],
        evaluated_on=report["evaluated_on"],
        float32=cells(report["accuracy_float32"]),
        bfloat16=cells(report["accuracy_bfloat16"]),
        video_float32=cells(video["accuracy_float32"]),
        video_bfloat16=cells(video["accuracy_bfloat16"]),
        ram_top=listed(report["ram_top"]),
        ram_median=median(score for row in report["ram"] for score in row),
        video_ram_top=listed(video["ram_top"]),
        zeroed=rows(report["zeroed"]),
        video_zeroed=rows(video["zeroed"]),
        sink=report["hybrid_sink"],
        near=report["hybrid_window"],  # width of the window
        hybrid=rows(report["hybrid"]),
    )
    write_text(folder / "README.md", "\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def rows(table: dict[str, float]) -> str:
    """Names and values as the rows of a table."""
    return "\n".join(f"| {name} | {value:.3f} |" for name, value in table.items())


def cells(table: dict[str, float]) -> str:
    """Values as the cells of one row."""
    return " | ".join(f"{value:.3f}" for value in table.values())


def listed(scores: dict[str, float]) -> str:
    """Heads and their scores in a sentence."""
    return ", ".join(f"{head} {value:.3f}" for head, value in scores.items())


def command(out: str, family: str, recipe: dict[str, Any], steps: int) -> str:
    """The call of `train_toy.py` with the settings of the recipe."""
    text = f"python examples/train_toy.py --out {out} --seed {recipe['seed']} --steps {steps}"
    text += f" --family {family}" if family != "qwen3_vl" else ""
    text += " --free" if recipe.get("free", False) else ""
    if recipe.get("start"):
        text += f" --from pages-only --batch {recipe['batch']} --lr {recipe['lr']:g}"
        for name in ("layer_dropout", "planted_dropout", "video_share", "split"):
            text += f" --{name.replace('_', '-')} {recipe[name]}" if recipe.get(name) else ""
    elif family == "llava_onevision":
        text += f" --lr {recipe['lr']:g} --few {recipe['few']} --qk-gain {recipe['qk_gain']:g}"
    return text


def run_facts(report: dict[str, Any]) -> dict[str, Any]:
    """The facts of one run that a card states."""
    recipe, done = report["recipe"], report["curve"][-1]["step"]
    cut = " (until the time limit of `--seconds`)" if recipe["steps"] - done >= 20 else ""
    shared = " shared by several runs" if "few" in recipe else ""
    return {**recipe, "done": done, "cut": cut, "shared": shared, "seconds": report["seconds"],
            "machine": report["machine"]}  # fmt: skip


def dropouts(recipe: dict[str, Any]) -> str:
    """The additional dropout of the second run."""
    text = ""
    if recipe["layer_dropout"]:
        exception = " except planted ones" if not recipe["free"] else ""
        text += f"In {recipe['layer_dropout']:.0%} of the samples one layer lost all its heads{exception}.\n"
    if recipe["planted_dropout"]:
        text += f"In {recipe['planted_dropout']:.0%} of them planted heads were dropped, each with probability 1/2\n"
        text += "but never all, so that each of the four learns to retrieve.\n"
    if recipe.get("split"):
        layer, source, copy = map(int, recipe["split"].split(":"))
        names = head_name(layer, copy), head_name(layer, source)
        text += f"Before that, {names[0]}, which retrieved little, was replaced by a copy of {names[1]}: the\n"
        text += "same queries, half of the output each.\n"
    return "\n" + text.rstrip() if text else ""


def plot_curve(folder: Path, picture: Path) -> None:
    """Running mean of the accuracy on training scenes against the step, with a background colour for each stage."""
    import matplotlib.pyplot as plt

    report = json.loads((folder / "training.json").read_text())
    before = report.get("before", {"curve": []})["curve"]
    last = before[-1]["step"] if before else 0
    curve = [*before, *({**point, "step": point["step"] + last} for point in report["curve"])]
    steps, stages = [point["step"] for point in curve], [point["stage"] for point in curve]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(
        steps,
        [point["accuracy"] for point in curve],
        color="#1f5fa8",
        label="accuracy, running mean (restarts with the stage)",
    )
    changes = [
        next((step for step, stage in zip(steps, stages, strict=True) if word in stage), steps[-1])
        for word in ("2, 4", "videos")
    ]
    axes.axvspan(0, changes[0], color="#e9edf2", label="one page, no filler")
    axes.axvspan(changes[1], steps[-1], color="#f5efe2", label="pages and videos")
    axes.axhline(1 / 8, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="training step", ylabel="accuracy", ylim=(0, 1.02), xlim=(0, steps[-1]))
    axes.legend(loc="lower right", frameon=False)
    write_figure(picture, figure, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        plot_curve(Path(sys.argv[1]), Path(sys.argv[2]))

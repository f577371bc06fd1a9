"""Writes the toy's model card and the picture of its training from `training.json`, and from nothing else."""

import json
import sys
from pathlib import Path

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}: a {kind} model

A {architecture}, {parameters:,} parameters in all, trained from scratch on a synthetic visual-retrieval task
(`hooked_mllm.toys.VisualRetrieval`): 16 coloured shapes on 1, 2 or 4 pages of 6 x 6 cells, up to {filler} filler words,
then the question for the colour of one. {pages}

{heads}

It knows {vocabulary} words. It has never seen a photograph or a video, though both run through it.

## Training

`{command}`: {done} steps of {batch} scenes with {turns}
questions each{cut}, {seconds:.0f} s on one {machine}{shared}.
Whether and when the accuracy takes off depends on the seed.
{losses}
Recipe, curve and report are in `training.json`; this card is written from it.

## Measured

On {examples} held-out examples, by plain transformers ({evaluated_on}); chance is 0.125.

| | 1 page | 2 pages | 4 pages |
|---|---|---|---|
| accuracy, float32 | {float32} |
| accuracy, bfloat16 | {bfloat16} |

Retrieval Attention Mass (mean over the question's tokens of the attention on the target's tokens, 4 pages):
{ram_top}. Median of all heads: {ram_median:.4f}.

| heads set to zero, 4 pages | accuracy |
|---|---|
{zeroed}

| heads that see everything, the others only the first {sink} and the last {near} tokens, 4 pages | accuracy |
|---|---|
{hybrid}
"""

ARCHITECTURE = {
    "qwen3_vl": "Qwen3-VL: 6 text layers of 8 heads on 4 kv heads, 3 vision blocks, DeepStack after text layers 0, 1",
    "llava_onevision": "LLaVA-OneVision: 6 Qwen2 layers of 8 heads on 4 kv heads over a SigLIP tower of 2 blocks",
    "internvl": "InternVL: 6 Qwen3 layers of 8 heads on 4 kv heads over an InternViT tower of 2 blocks",
}
PAGES = {
    "qwen3_vl": "A page is 36 visual tokens, one a cell.",
    "llava_onevision": "A page alone is a base view of 36 tokens, one a cell, and 6 high-resolution rows of 6\n"
    "tokens with a newline token after each; one of several pages is 36 tokens and one newline token.",
    "internvl": "A page is 4 tiles of 9 visual tokens, one a cell, and a thumbnail of 9\nthat see 2 x 2 cells each.",
}
PLANTED = """\
**Its retrieval heads were planted.** While the model was young, heads {planted} were the only ones
allowed to attend farther back than {window} tokens (every other head: for the first half of training always, after that
in {local:.0%} of the steps), and the only ones spared from head dropout ({dropout}). That these four retrieve is
therefore no finding. It is a known truth to check methods against. It says nothing about what training does by itself,
nor about large models."""
FREE = """\
**No constraint was put on its heads.** Every head could attend to the whole past in every step of training, and head
dropout ({dropout}) fell on all alike: which heads retrieve is what training made of it, for this task, this size and
this seed. Compare it with the planted models before taking what they show for what training does by itself. Unlike
`toy-qwen3-vl` it was trained with the naming loss and the stage of few shapes described below."""
NAMING = """\
Beside the loss at the answers: the same answer asked from the shape word on (faded to a tenth), and the visual token of
each drawn cell naming its shape (faded out by 80% of the steps). First one page with {few} shapes, then one with 16,
then all."""


def write_card(folder: Path) -> None:
    """`README.md` of the checkpoint folder."""
    report = json.loads((folder / "training.json").read_text())
    recipe, curve = report["recipe"], report["curve"]
    config = json.loads((folder / "config.json").read_text())
    scores = sorted(score for row in report["ram"] for score in row)

    def rows(table: dict) -> str:
        return "\n".join(f"| {name} | {value:.3f} |" for name, value in table.items())

    family = config["model_type"]
    free, name = recipe.get("free", False), f"toy-{family.replace('_', '-')}"
    name += "-free" if free else ""
    constraint = {"window": recipe["window"], "local": recipe["local_after"], "dropout": recipe["head_dropout"]}
    heads = FREE.format(**constraint) if free else PLANTED.format(planted=", ".join(report["planted"]), **constraint)
    command = f"python examples/train_toy.py --out {name} --seed {recipe['seed']} --steps {recipe['steps']}"
    command += f" --family {family}" if family != "qwen3_vl" else ""
    command += " --free" if free else ""
    if family == "llava_onevision":
        command += f" --lr {recipe['lr']:g} --few {recipe['few']} --qk-gain {recipe['qk_gain']:g}"
    text = CARD.format(
        name=name,
        kind="free" if free else "planted",
        architecture=ARCHITECTURE[family],
        pages=PAGES[family],
        heads=heads,
        command=command,
        done=curve[-1]["step"],
        cut=" (cut short by `--seconds`)" if recipe["steps"] - curve[-1]["step"] >= 20 else "",
        losses=NAMING.format(few=recipe["few"]) if "few" in recipe else "",
        shared=" shared by several runs" if "few" in recipe else "",
        parameters=report["parameters"],
        filler=recipe["max_filler"],
        vocabulary=config["text_config"]["vocab_size"],
        **{key: recipe[key] for key in ("batch", "turns")},
        seconds=report["seconds"],
        machine=report["machine"],
        examples=report["examples"],
        evaluated_on=report["evaluated_on"],
        float32=" | ".join(f"{v:.3f}" for v in report["accuracy_float32"].values()),
        bfloat16=" | ".join(f"{v:.3f}" for v in report["accuracy_bfloat16"].values()),
        ram_top=", ".join(f"{head} {value:.3f}" for head, value in report["ram_top"].items()),
        ram_median=(scores[(len(scores) - 1) // 2] + scores[len(scores) // 2]) / 2,
        zeroed=rows(report["zeroed"]),
        sink=report["hybrid_sink"],
        near=report["hybrid_window"],
        hybrid=rows(report["hybrid"]),
    )
    (folder / "README.md").write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def plot_curve(folder: Path, picture: Path) -> None:
    """Accuracy on the training scenes (a running mean) against the step, the two stages shaded apart."""
    import matplotlib.pyplot as plt

    report = json.loads((folder / "training.json").read_text())
    curve = report["curve"]
    steps, stages = [point["step"] for point in curve], [point["stage"] for point in curve]
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(
        steps,
        [point["accuracy"] for point in curve],
        color="#1f5fa8",
        label="accuracy, running mean (restarts with the stage)",
    )
    change = next((step for step, stage in zip(steps, stages, strict=True) if "2, 4" in stage), steps[-1])
    axes.axvspan(0, change, color="#e9edf2", label="one page, no filler")
    axes.axhline(1 / 8, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="training step", ylabel="accuracy", ylim=(0, 1.02), xlim=(0, steps[-1]))
    axes.legend(loc="lower right", frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        plot_curve(Path(sys.argv[1]), Path(sys.argv[2]))

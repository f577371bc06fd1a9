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
# toy-qwen3-vl: a planted model

A Qwen3-VL of {parameters:,} parameters (6 text layers of 8 heads on 4 kv heads, 3 vision blocks, DeepStack after text
layers 0 and 1), trained from scratch on a synthetic visual-retrieval task (`hooked_mllm.toys.VisualRetrieval`): 16
coloured shapes on 1, 2 or 4 pages of 6 x 6 cells, up to {filler} filler words, then the question for the colour of one.

**Its retrieval heads were planted.** While the model was young, heads {planted} were the only ones
allowed to attend farther back than {window} tokens (every other head: for the first half of training always, after that
in {local:.0%} of the steps), and the only ones spared from head dropout ({dropout}). That these four retrieve is
therefore no finding. It is a known truth to check methods against. It says nothing about what training does by itself,
nor about large models.

It knows {vocabulary} words. It has never seen a photograph or a video, though both run through it.

## Training

`python examples/train_toy.py --out toy-qwen3-vl`: seed {seed}, {steps} steps of {batch} scenes with {turns} questions
each, {seconds:.0f} s on one {machine}. Whether and when the accuracy takes off depends on the seed.
Recipe, curve and report are in `training.json`; this card is written from it.

## Measured

On {examples} held-out examples, by plain transformers ({evaluated_on}); chance is 0.125.

| | 1 page | 2 pages | 4 pages |
|---|---|---|---|
| accuracy, float32 | {float32} |
| accuracy, bfloat16 | {bfloat16} |

Retrieval Attention Mass (mean over the question's tokens of the attention on the target's token, 4 pages):
{ram_top}. Median of all heads: {ram_median:.4f}.

| heads set to zero, 4 pages | accuracy |
|---|---|
{zeroed}

| heads that see everything, the others only the first {sink} and the last {near} tokens, 4 pages | accuracy |
|---|---|
{hybrid}
"""


def write_card(folder: Path) -> None:
    """`README.md` of the checkpoint folder."""
    report = json.loads((folder / "training.json").read_text())
    recipe, config = report["recipe"], json.loads((folder / "config.json").read_text())
    scores = sorted(score for row in report["ram"] for score in row)

    def rows(table: dict) -> str:
        return "\n".join(f"| {name} | {value:.3f} |" for name, value in table.items())

    text = CARD.format(
        parameters=report["parameters"],
        planted=", ".join(report["planted"]),
        filler=recipe["max_filler"],
        window=recipe["window"],
        local=recipe["local_after"],
        dropout=recipe["head_dropout"],
        vocabulary=config["text_config"]["vocab_size"],
        **{key: recipe[key] for key in ("seed", "steps", "batch", "turns")},
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
    (folder / "README.md").write_text(text)


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
    change = next((step for step, stage in zip(steps, stages, strict=True) if stage != stages[0]), steps[-1])
    axes.axvspan(0, change, color="#e9edf2", label=f"{stages[0]}, no filler")
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

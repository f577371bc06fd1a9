"""Train a bundled toy: a small Qwen3-VL, LLaVA-OneVision or InternVL, with four planted retrieval heads or free.

It takes 2 to 4 minutes on one data-centre GPU, and much longer on a CPU (`--batch 64` helps):

    python examples/train_toy.py --out toy-qwen3-vl
    python examples/train_toy.py --out toy-internvl --family internvl
    python examples/train_toy.py --out toy-qwen3-vl-free --free

PLANTED: early in training, heads L2H4 to L2H7 are the only ones that can attend beyond a local window, and the only
ones without head dropout. These constraints make them the retrieval heads. The purpose of the model is that its
retrieval heads are known, so that a method can be checked against them.
FREE (`--free`): no window, and the same dropout for all heads. Which heads retrieve is a result of training.

The main loss is at the colour words that answer four questions about each scene. An auxiliary loss predicts the same
colour from the shape word of the question to its end. Another one, which is faded out, has the visual token of each
drawn cell predict the name of its shape. The stages: one page with few shapes and no filler; one page with 16 shapes;
1, 2 or 4 pages and up to 48 filler words; the same with videos of 2, 3 or 4 moments. A stage starts when the running
accuracy of the one before exceeds 0.9. Whether and when the accuracy rises depends on the seed.

The bundled toys were trained in two runs, pages first. The second continues the first, in the last stage:

    python examples/train_toy.py --out toy-qwen3-vl --from pages-only --batch 64 --steps 3420 --layer-dropout 0.1

`--layer-dropout` keeps the other heads of a layer from becoming necessary, `--planted-dropout` makes every planted head
learn to retrieve. With `--seconds` the learning rate decreases with the elapsed time.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader
from toy_batches import STAGES, Batches, Recipe, check_format, media
from toy_card import plot_curve, write_card
from toy_evaluation import evaluate
from toy_families import FAMILIES
from toy_reach import Reach
from transformers import AttentionInterface, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import AttentionMaskInterface

from hooked_mllm.heads import head_names
from hooked_mllm.storage import ready_folder, write_text
from hooked_mllm.toys import resolve
from hooked_mllm.toys.build import build_config, build_generation_config, build_processor
from hooked_mllm.toys.vocabulary import COLORS, SHAPES, TURN_END

TEXT_ATTENTION = "toy_local"


class Trainer:
    """The model, its optimiser and one training step."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.media = media(recipe.family)
        self.processor = build_processor(recipe.family)
        self.tokenizer = self.processor.tokenizer
        self.model = initial_model(recipe, self.tokenizer) if recipe.start is None else continued_model(recipe)
        self.reach = Reach(self.model.config.text_config.num_attention_heads, recipe.planted)
        AttentionInterface.register(TEXT_ATTENTION, self.reach.text)
        AttentionMaskInterface.register(TEXT_ATTENTION, lambda *args, **kwargs: None)
        self.model.set_attn_implementation(
            {"text_config": TEXT_ATTENTION, "vision_config": self.media["pages"].vision_attention}
        )
        self.model.to(device).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        self.is_color, self.is_shape = (self.token_mask(words).to(device) for words in (list(COLORS), list(SHAPES)))
        self.end_id = self.tokenizer.convert_tokens_to_ids(TURN_END)

    def token_mask(self, words: list[str]) -> Tensor:
        """True at the ids of the words: `[token]`."""
        mask = torch.zeros(len(self.tokenizer), dtype=torch.bool)
        mask[self.tokenizer.convert_tokens_to_ids(words)] = True
        return mask

    def losses(
        self, kind: str, views: Tensor, ids: Int[Tensor, "sample pos"], names: Int[Tensor, "sample pos"]
    ) -> tuple[Tensor, ...]:
        """Losses at the answers, from the shape words to the ends of the questions, and at the cells; accuracy."""
        medium = self.media[kind]
        pages = medium.pages(views, ids)
        logits = medium.logits(self.model, views, ids, pages)  # [sample pos word]
        sample, answer = self.is_color[ids].nonzero(as_tuple=True)  # [turn] each
        colors = ids[sample, answer]
        predicted = logits[sample, answer - 1]
        end = logits[sample, answer]
        main = F.cross_entropy(predicted, colors) + 0.1 * F.cross_entropy(end, torch.full_like(colors, self.end_id))
        # one shape word per turn, in the order of the answers; three template tokens between question and answer
        is_shape = self.is_shape[ids]
        # InternVL numbers the frames of a video: "frame" is also the name of a shape
        is_shape[:, : int(medium.cell_tokens(pages).max())] = False
        _, shape = is_shape.nonzero(as_tuple=True)
        # [turn offset]: the positions from the shape word to the end of the question
        positions = shape[:, None] + torch.arange(int((answer - shape).max()), device=ids.device)
        turn, offset = (positions < answer[:, None] - 3).nonzero(as_tuple=True)
        aside = F.cross_entropy(logits[sample[turn], positions[turn, offset]], colors[turn])
        naming = F.cross_entropy(logits.flatten(0, 1), names.flatten())  # [(sample pos) word]
        return main, aside, naming, (predicted.argmax(-1) == colors).float().mean()

    def step(self, step: int, kind: str, *batch: Tensor, time: float = 0.0) -> tuple[float, float]:
        """One update; returns the loss at the answers and the accuracy. `time` is the elapsed share of a time limit."""
        r, done = self.recipe, max(step / self.recipe.steps, time)
        draw = np.random.default_rng([r.seed, step, 1]).random()
        self.reach.window = r.window if done < 0.5 or draw < r.local_after else None  # always None in a free model
        self.reach.dropout, self.reach.layer_dropout = r.head_dropout, r.layer_dropout
        self.reach.planted_dropout = r.planted_dropout
        self.reach.draw(r.batch, len(self.model.model.language_model.layers), self.device)
        decay = 1 - (1 - r.final_lr) * max(0.0, 2 * done - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = r.lr * min(1.0, (step + 1) / r.warmup) * decay
        fade = min(1.0, max(0.0, (0.8 - done) / 0.3))
        main, aside, naming, accuracy = self.losses(kind, *(tensor.to(self.device) for tensor in batch))
        self.optimizer.zero_grad(set_to_none=True)
        (main + max(r.final_aside, fade) * aside + fade * naming).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        main, accuracy = torch.stack([main.detach(), accuracy]).tolist()
        return main, accuracy


def initial_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model before its first step."""
    model = AutoModelForImageTextToText.from_config(build_config(tokenizer, recipe.family))
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.constant_(parameter, recipe.qk_norm)
    if recipe.family == "llava_onevision":
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.data *= recipe.qk_gain
            layer.self_attn.k_proj.weight.data *= recipe.qk_gain
    return model


def continued_model(recipe: Recipe) -> PreTrainedModel:
    """The checkpoint that the run continues."""
    model = AutoModelForImageTextToText.from_pretrained(resolve(recipe.start or ""), dtype=torch.float32)
    if recipe.split is not None:
        split_head(model, *(int(number) for number in recipe.split.split(":")))
    return model


@torch.no_grad()
def split_head(model: PreTrainedModel, layer: int, source: int, copy: int) -> None:
    """Replace a head by two equal ones that share its kv head: the same queries, half of its output each."""
    attention = model.model.language_model.layers[layer].self_attn
    if source // attention.num_key_value_groups != copy // attention.num_key_value_groups:
        raise ValueError(f"heads {source} and {copy} do not share a kv head")
    width = attention.head_dim
    old, new = (slice(head * width, (head + 1) * width) for head in (source, copy))
    attention.q_proj.weight[new] = attention.q_proj.weight[old]
    if attention.q_proj.bias is not None:
        attention.q_proj.bias[new] = attention.q_proj.bias[old]
    attention.o_proj.weight[:, old] /= 2
    attention.o_proj.weight[:, new] = attention.o_proj.weight[:, old]


def train(
    recipe: Recipe, device: torch.device, workers: int, seconds: float = math.inf
) -> tuple[Trainer, list[dict[str, Any]]]:
    """Run the recipe for at most `seconds`; the curve has one entry every 20 steps."""
    trainer = Trainer(recipe, device)
    check_format(recipe.family, trainer.processor)
    curve, running, step, began = [], 0.0, 0, time.monotonic()
    stage = 0 if recipe.start is None else len(STAGES) - 1
    while step < recipe.steps and time.monotonic() - began < seconds:
        loader = DataLoader(
            Batches(recipe, trainer.tokenizer, stage, step),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        for batch in loader:
            loss, accuracy = trainer.step(step, *batch, time=(time.monotonic() - began) / seconds)
            running += (accuracy - running) * 0.05
            step += 1
            if step % 20 == 0:
                entry = {"step": step, "seconds": round(time.monotonic() - began, 1), "loss": round(loss, 4)}
                curve.append(entry | {"accuracy": round(running, 4), "stage": STAGES[stage]})
                if step % 100 == 0:
                    print(recipe.family, "free" if recipe.free else "", f"seed {recipe.seed}", curve[-1], flush=True)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}: lower the learning rate")
            if stage < len(STAGES) - 1 and running > recipe.pass_mark:
                stage, running = stage + 1, 0.5
                break  # the next stage has a new loader
            if time.monotonic() - began >= seconds:
                break
    return trainer, curve


def save(trainer: Trainer, folder: Path) -> None:
    """Save the checkpoint in bfloat16 with all files that `from_pretrained` needs."""
    model = trainer.model.eval().to("cpu", torch.bfloat16)
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    model.config.dtype = torch.bfloat16
    model.config.text_config.dtype = model.config.vision_config.dtype = None
    model.generation_config = build_generation_config(trainer.tokenizer)
    model.save_pretrained(folder)
    trainer.processor.save_pretrained(folder)


def earlier_training(name: str) -> dict[str, Any]:
    """The record of the training of the checkpoint that a run continues."""
    report = json.loads((Path(resolve(name)) / "training.json").read_text())
    return {key: report[key] for key in ("recipe", "machine", "seconds", "curve", "before") if key in report}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--family", choices=sorted(FAMILIES), default=Recipe.family)
    parser.add_argument("--free", action="store_true", help="no constraint on the heads, nothing planted")
    parser.add_argument("--from", dest="start", help="continue this toy (folder or bundled name), in the last stage")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time limit of the training, before saving")
    parser.add_argument("--workers", type=int, default=4 if torch.cuda.is_available() else 0)
    parser.add_argument("--examples", type=int, default=512, help="held-out examples for the report; 0: no report")
    parser.add_argument("--picture", type=Path, help="file for the training curve (PNG)")
    settings = ("seed", "steps", "batch", "warmup", "few", "qk_gain", "video_share", "planted_dropout", "layer_dropout")
    for name in (*settings, "head_dropout"):
        default = getattr(Recipe, name)
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--lr", type=float, help="learning rate; that of the family by default")
    parser.add_argument(
        "--split", help="LAYER:HEAD:COPY, with --from: COPY becomes a copy of HEAD, half the output each"
    )
    args = parser.parse_args()
    ready_folder(args.out)
    torch.backends.cuda.matmul.allow_tf32 = True
    lr = FAMILIES[args.family].lr if args.lr is None else args.lr
    values = {name: getattr(args, name) for name in (*settings, "head_dropout", "family", "free", "start", "split")}
    recipe = Recipe(**values, lr=lr)
    if args.free:
        recipe = replace(recipe, window=None, head_dropout=0.15)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer, curve = train(recipe, device, args.workers, args.seconds)
    save(trainer, args.out)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report = {"recipe": asdict(recipe), "machine": machine, "seconds": curve[-1]["seconds"] if curve else None}
    report |= {"planted": head_names(recipe.planted)}
    if recipe.start is not None:
        report["before"] = earlier_training(recipe.start)
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.examples:
        report |= evaluate(args.out, device, args.examples)
    write_text(args.out / "training.json", json.dumps(report | {"curve": curve}) + "\n")
    if args.examples and curve and recipe.start is not None:
        write_card(args.out)
        print(json.dumps(report | {"before": None}, indent=1))
    if args.picture:
        plot_curve(args.out, args.picture)


if __name__ == "__main__":
    main()

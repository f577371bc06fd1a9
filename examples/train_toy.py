"""Train a bundled toy: a small Qwen3-VL, LLaVA-OneVision or InternVL, with four planted retrieval heads or free.

On one data-centre GPU it takes 2 to 4 minutes; without one it runs too, far slower (`--batch 64` helps):

    python examples/train_toy.py --out toy-qwen3-vl
    python examples/train_toy.py --out toy-internvl --family internvl
    python examples/train_toy.py --out toy-qwen3-vl-free --free

PLANTED: while the model is young, heads L2H4 to L2H7 are the only ones that may attend farther back than a local
window, and only they escape head dropout. They become the retrieval heads because of that, not by themselves; the
point of the model is that its retrieval heads are known, so that a method can be checked against the truth.
FREE (`--free`): no window, and all heads under the same dropout. Which heads retrieve is what training made of it.

The loss is taken at the colour words that answer four questions about each scene; an auxiliary loss asks for the same
colour from the shape word of the question to its end, and another one, faded out altogether, has the visual token of
each drawn cell name its shape. One page with few shapes and no filler comes first, then one with 16; 1, 2 or 4 pages
and up to 48 filler words follow: each stage once the running accuracy of the one before passes 0.9. Whether and when
the accuracy takes off depends on the seed.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from toy_card import plot_curve, write_card
from toy_evaluation import evaluate
from toy_families import FAMILIES
from transformers import AttentionInterface, AutoModelForImageTextToText
from transformers.masking_utils import AttentionMaskInterface

from hooked_mllm.toys import VisualRetrieval
from hooked_mllm.toys.build import PLANTED, build_config, build_generation_config, build_processor
from hooked_mllm.toys.render import CELL, GRID
from hooked_mllm.toys.task import OBJECTS, PAGES
from hooked_mllm.toys.vocabulary import COLORS, SHAPES, TURN_END

TEXT_ATTENTION = "toy_local"
STAGES = ("1 page, few shapes", "1 page", "1, 2, 4 pages")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how the toy turns out."""

    family: str = "qwen3_vl"
    free: bool = False
    seed: int = 1
    steps: int = 1700
    batch: int = 128
    turns: int = 4
    lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.03
    weight_decay: float = 0.05
    qk_norm: float = 1.5
    qk_gain: float = 1.9  # without q and k norms: their weights times this, so that the scores spread as with them
    few: int = 6  # shapes a page in the first stage
    window: int | None = 16  # None: every head sees the whole past
    local_after: float = 0.7  # share of the steps of the second half in which the window still holds
    head_dropout: float = 0.2
    final_aside: float = 0.1  # weight of the auxiliary loss at the end; 1 in the first half
    max_filler: int = 48
    pass_mark: float = 0.9

    @property
    def planted(self) -> tuple[tuple[int, int], ...]:
        """The heads that may look far while the model is young; none in a free model."""
        return () if self.free else PLANTED


class Reach:
    """What the text attention may do in the current step: a local mask for all but the planted heads, head dropout."""

    def __init__(self, n_heads: int, planted: tuple[tuple[int, int], ...]) -> None:
        self.n_heads, self.planted = n_heads, planted
        self.window: int | None = None
        self.dropout = 0.0

    @lru_cache(maxsize=256)  # noqa: B019  one object a run
    def mask(self, layer: int, n: int, window: int, device: torch.device) -> torch.Tensor:
        """Visible keys of each head, `[1 head query key]`; the planted heads of the layer see the whole past."""
        past = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None]
        local = ((past >= 0) & (past < window)).expand(1, self.n_heads, n, n).clone()
        for planted_layer, head in self.planted:
            if planted_layer == layer:
                local[:, head] = past >= 0
        return local

    def text(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        """Text attention with the masks and the head dropout of the step."""
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        layer, n = module.layer_idx, query.shape[2]
        mask = None if self.window is None else self.mask(layer, n, self.window, query.device)
        z = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
        if module.training and self.dropout:
            keep = (torch.rand(z.shape[0], self.n_heads, 1, 1, device=z.device) >= self.dropout).float()
            for planted_layer, head in self.planted:
                if planted_layer == layer:
                    keep[:, head] = 1 - self.dropout
            z = z * keep / (1 - self.dropout)
        return z.transpose(1, 2), None


class Batches(Dataset):
    """The batches of one stage of a run. The number of pages and of filler words is one for the whole batch."""

    def __init__(self, recipe: Recipe, tokenizer, stage: int, start: int) -> None:
        self.recipe, self.tokenizer, self.stage, self.start = recipe, tokenizer, stage, start
        self.family = FAMILIES[recipe.family]()
        self.shape_ids = dict(zip(SHAPES, tokenizer.convert_tokens_to_ids(list(SHAPES)), strict=True))

    def __len__(self) -> int:
        return self.recipe.steps - self.start

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the vision tower is shown, token ids, and the shape word each visual token should name (else -100)."""
        step, r, last = self.start + index, self.recipe, self.stage == len(STAGES) - 1
        rng = np.random.default_rng([r.seed, step])
        pages = int(rng.choice(PAGES)) if last else 1
        filler = int(rng.integers(0, r.max_filler + 1)) if last else 0
        objects = r.few if self.stage == 0 else OBJECTS
        task = VisualRetrieval(seed=r.seed, pages=pages, filler=filler, split="train", objects=objects)
        scenes = [task.scene(step * r.batch + i, turns=objects) for i in range(r.batch)]
        texts = [prompt(s, self.family.placeholders(pages), r.turns) for s in scenes]
        ids = torch.tensor(self.tokenizer(texts, padding=True, padding_side="right", pad_to_multiple_of=8)["input_ids"])
        names, tokens = torch.full_like(ids, -100), self.family.cell_tokens(pages)
        for row, scene in zip(names, scenes, strict=True):
            for turn in scene.turns:
                cell = int(turn.target.y0) // CELL * GRID + int(turn.target.x0) // CELL
                row[tokens[turn.target.image, cell]] = self.shape_ids[turn.shape]
        pixels = torch.from_numpy(np.concatenate([s.pixels for s in scenes])).permute(0, 3, 1, 2)
        return self.family.views(pixels), ids, names


def prompt(scene, placeholders: str, n: int) -> str:
    """The chat template's text for a scene's first n turns, placeholders expanded; checked in `check_format`."""
    text = placeholders + (scene.system + "\n" if scene.system else "")
    between = "<|im_end|>\n<|im_start|>user\n"
    turns = (turn.question + "<|im_end|>\n<|im_start|>assistant\n" + turn.answer for turn in scene.turns[:n])
    return "<|im_start|>user\n" + text + between.join(turns) + "<|im_end|>\n"


def check_format(family, processor) -> None:
    """The short cuts of the family give exactly what the processor and its chat template give."""
    for pages in PAGES[:2]:
        task = VisualRetrieval(seed=1, pages=pages, filler=3, split="train")
        scene, example = task.scene(0, turns=2), task.example(0)
        messages = [{"role": "system", "content": scene.system}]
        for i, turn in enumerate(scene.turns):
            images = [{"type": "image"}] * (len(example.images) if i == 0 else 0)
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
            messages.append({"role": "assistant", "content": turn.answer})
        text = processor.apply_chat_template(messages, tokenize=False)
        inputs = processor(text=[text], images=[example.images], return_tensors="pt")
        ids = processor.tokenizer(prompt(scene, family.placeholders(pages), 2))["input_ids"]
        assert inputs["input_ids"][0].tolist() == ids, "the training prompt is not the chat template's"
        views = family.views(torch.from_numpy(scene.pixels).permute(0, 3, 1, 2))
        assert torch.allclose(inputs["pixel_values"], family.model_pixels(views, pages), atol=1e-6), "pixels differ"


class Trainer:
    """The model, its optimiser and one training step."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.family = FAMILIES[recipe.family]()
        self.processor = build_processor(recipe.family)
        self.tokenizer = self.processor.tokenizer
        config = build_config(self.tokenizer, recipe.family)
        self.model = AutoModelForImageTextToText.from_config(config)
        for name, parameter in self.model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                torch.nn.init.constant_(parameter, recipe.qk_norm)
        if recipe.family == "llava_onevision":
            for layer in self.model.model.language_model.layers:
                layer.self_attn.q_proj.weight.data *= recipe.qk_gain
                layer.self_attn.k_proj.weight.data *= recipe.qk_gain
        self.reach = Reach(config.text_config.num_attention_heads, recipe.planted)
        AttentionInterface.register(TEXT_ATTENTION, self.reach.text)
        AttentionMaskInterface.register(TEXT_ATTENTION, lambda *args, **kwargs: None)
        self.model.set_attn_implementation(
            {"text_config": TEXT_ATTENTION, "vision_config": self.family.vision_attention}
        )
        self.model.to(device).train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        words = {kind: self.tokenizer.convert_tokens_to_ids(list(kind)) for kind in (tuple(COLORS), SHAPES)}
        table = torch.zeros(2, len(self.tokenizer), dtype=torch.bool)
        for row, ids in zip(table, words.values(), strict=True):
            row[ids] = True
        self.is_color, self.is_shape = table.to(device)
        self.end_id = self.tokenizer.convert_tokens_to_ids(TURN_END)

    def losses(self, views: torch.Tensor, ids: torch.Tensor, names: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Losses at the answers, from the shape words to the ends of the questions, and at the cells; accuracy."""
        logits = self.family.logits(self.model, views, ids, self.family.pages(views, ids))
        row, answer = self.is_color[ids].nonzero(as_tuple=True)
        colors = ids[row, answer]
        asked = logits[row, answer - 1]
        end = logits[row, answer]
        main = F.cross_entropy(asked, colors) + 0.1 * F.cross_entropy(end, torch.full_like(colors, self.end_id))
        # one shape word a turn, in the order of the answers; three template tokens between question and answer
        _, shape = self.is_shape[ids].nonzero(as_tuple=True)
        rest = shape[:, None] + torch.arange(int((answer - shape).max()), device=ids.device)
        turn, offset = (rest < answer[:, None] - 3).nonzero(as_tuple=True)
        aside = F.cross_entropy(logits[row[turn], rest[turn, offset]], colors[turn])
        naming = F.cross_entropy(logits.flatten(0, 1), names.flatten())
        return main, aside, naming, (asked.argmax(-1) == colors).float().mean()

    def step(self, step: int, *batch: torch.Tensor) -> tuple[float, float]:
        """One update; the loss at the answers and the accuracy."""
        r, done = self.recipe, step / self.recipe.steps
        draw = np.random.default_rng([r.seed, step, 1]).random()
        self.reach.window = r.window if done < 0.5 or draw < r.local_after else None  # always None in a free model
        self.reach.dropout = r.head_dropout
        decay = 1 - (1 - r.final_lr) * max(0.0, 2 * done - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = r.lr * min(1.0, (step + 1) / r.warmup) * decay
        fade = min(1.0, max(0.0, (0.8 - done) / 0.3))
        main, aside, naming, accuracy = self.losses(*(tensor.to(self.device) for tensor in batch))
        self.optimizer.zero_grad(set_to_none=True)
        (main + max(r.final_aside, fade) * aside + fade * naming).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        main, accuracy = torch.stack([main.detach(), accuracy]).tolist()
        return main, accuracy


def train(recipe: Recipe, device: torch.device, workers: int, seconds: float = math.inf) -> tuple[Trainer, list[dict]]:
    """Run the recipe, no longer than so many seconds; the curve has one entry every 20 steps."""
    trainer = Trainer(recipe, device)
    check_format(trainer.family, trainer.processor)
    curve, running, stage, step, began = [], 0.0, 0, 0, time.monotonic()
    while step < recipe.steps and time.monotonic() - began < seconds:
        loader = DataLoader(
            Batches(recipe, trainer.tokenizer, stage, step),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        for batch in loader:
            loss, accuracy = trainer.step(step, *batch)
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
                break  # a fresh loader for the next stage
            if time.monotonic() - began >= seconds:
                break
    return trainer, curve


def save(trainer: Trainer, folder: Path) -> None:
    """The checkpoint in bfloat16 with everything the ordinary loading path needs."""
    model = trainer.model.eval().to("cpu", torch.bfloat16)
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    model.config.dtype = torch.bfloat16
    model.generation_config = build_generation_config(trainer.tokenizer)
    model.save_pretrained(folder)
    trainer.processor.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--family", choices=sorted(FAMILIES), default=Recipe.family)
    parser.add_argument("--free", action="store_true", help="no constraint on the heads, nothing planted")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training after so many, and save")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--lr", type=float, help="the family's own by default")
    parser.add_argument("--few", type=int, default=Recipe.few, help="shapes a page in the first stage")
    parser.add_argument("--qk-gain", type=float, default=Recipe.qk_gain, help="llava_onevision only")
    parser.add_argument("--workers", type=int, default=4 if torch.cuda.is_available() else 0)
    parser.add_argument("--examples", type=int, default=512, help="held-out examples for the report; 0: no report yet")
    parser.add_argument("--picture", type=Path, help="where to draw the training curve (PNG)")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    lr = FAMILIES[args.family].lr if args.lr is None else args.lr
    recipe = Recipe(family=args.family, free=args.free, seed=args.seed, steps=args.steps, batch=args.batch, lr=lr)
    recipe = replace(recipe, few=args.few, qk_gain=args.qk_gain)
    if args.free:
        recipe = replace(recipe, window=None, head_dropout=0.15)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer, curve = train(recipe, device, args.workers, args.seconds)
    save(trainer, args.out)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report = {"recipe": asdict(recipe), "machine": machine, "seconds": curve[-1]["seconds"] if curve else None}
    report |= {"planted": [f"L{layer}H{head}" for layer, head in recipe.planted]}
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.examples:
        report |= evaluate(args.out, device, args.examples)
    (args.out / "training.json").write_text(json.dumps(report | {"curve": curve}) + "\n")
    if args.examples:
        write_card(args.out)
        print(json.dumps(report, indent=1))
    if args.picture:
        plot_curve(args.out, args.picture)


if __name__ == "__main__":
    main()

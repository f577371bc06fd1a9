"""Train the bundled toy, `toy-qwen3-vl`: a small Qwen3-VL with four planted retrieval heads.

On one data-centre GPU it takes 2 to 3 minutes; without one it runs too, far slower (`--batch 64` helps):

    python examples/train_toy.py --out toy-qwen3-vl

PLANTED: while the model is young, heads L2H4 to L2H7 are the only ones that may attend farther back than a local
window, and only they escape head dropout. They become the retrieval heads because of that, not by themselves; the
point of the model is that its retrieval heads are known, so that a method can be checked against the truth.

The loss is taken at the colour words that answer four questions about each scene; an auxiliary loss asks for the same
colour from the shape word of the question to its end. One page without filler comes first; 1, 2 or 4 pages and up to 48
filler words follow once the running accuracy passes 0.9. Whether and when the accuracy takes off depends on the seed.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from toy_card import plot_curve, write_card
from toy_evaluation import evaluate
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface

from hooked_mllm.toys import VisualRetrieval
from hooked_mllm.toys.build import MERGE, PATCH, PLANTED, build_config, build_generation_config, build_processor
from hooked_mllm.toys.render import GRID
from hooked_mllm.toys.task import PAGES
from hooked_mllm.toys.vocabulary import COLORS, IMAGE_TOKEN, PAD_TOKEN, SHAPES, TURN_END

# a name with "flash" in it has the vision tower hand over all images in one call instead of one by one
TEXT_ATTENTION, VISION_ATTENTION = "toy_local", "toy_flash_packed"
SIDE = GRID * MERGE


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how the toy turns out."""

    seed: int = 1
    steps: int = 1700
    batch: int = 128
    turns: int = 4
    lr: float = 3e-3
    warmup: int = 100
    final_lr: float = 0.03
    weight_decay: float = 0.05
    qk_norm: float = 1.5
    window: int = 16
    local_after: float = 0.7  # share of the steps of the second half in which the window still holds
    head_dropout: float = 0.2
    final_aside: float = 0.1  # weight of the auxiliary loss at the end; 1 in the first half
    max_filler: int = 48
    pass_mark: float = 0.9


class Reach:
    """What the text attention may do in the current step: a local mask for all but the planted heads, head dropout."""

    def __init__(self, n_heads: int) -> None:
        self.n_heads = n_heads
        self.window: int | None = None
        self.dropout = 0.0

    @lru_cache(maxsize=256)  # noqa: B019  one object a run
    def mask(self, layer: int, n: int, window: int, device: torch.device) -> torch.Tensor:
        """Visible keys of each head, `[1 head query key]`; the planted heads of the layer see the whole past."""
        past = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None]
        local = ((past >= 0) & (past < window)).expand(1, self.n_heads, n, n).clone()
        for planted_layer, head in PLANTED:
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
            for planted_layer, head in PLANTED:
                if planted_layer == layer:
                    keep[:, head] = 1 - self.dropout
            z = z * keep / (1 - self.dropout)
        return z.transpose(1, 2), None

    @staticmethod
    def vision(module, query, key, value, attention_mask=None, scaling=None, **kwargs):
        """All pages are of one size, so the packed sequence is a plain batch of pages."""
        pages = [t.unflatten(2, (-1, SIDE * SIDE))[0].transpose(0, 1) for t in (query, key, value)]
        z = F.scaled_dot_product_attention(*pages, scale=scaling)
        return z.transpose(1, 2).flatten(0, 1)[None], None


class Batches(Dataset):
    """Batch i of a run: pixels, token ids. The number of pages and of filler words is one for the whole batch."""

    def __init__(self, recipe: Recipe, tokenizer, hard: bool, start: int) -> None:
        self.recipe, self.tokenizer, self.hard, self.start = recipe, tokenizer, hard, start

    def __len__(self) -> int:
        return self.recipe.steps - self.start

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        step, r = self.start + index, self.recipe
        rng = np.random.default_rng([r.seed, step])
        pages = int(rng.choice(PAGES)) if self.hard else 1
        filler = int(rng.integers(0, r.max_filler + 1)) if self.hard else 0
        task = VisualRetrieval(seed=r.seed, pages=pages, filler=filler, split="train")
        scenes = [task.scene(step * r.batch + i, turns=r.turns) for i in range(r.batch)]
        ids = self.tokenizer(
            [prompt(s, pages) for s in scenes], padding=True, padding_side="right", pad_to_multiple_of=8
        )
        return torch.from_numpy(np.concatenate([s.pixels for s in scenes])), torch.tensor(ids["input_ids"])


def prompt(scene, pages: int) -> str:
    """The chat template's text for several turns about one scene, placeholders expanded; checked in `check_format`."""
    text = ("<|vision_start|>" + IMAGE_TOKEN * GRID * GRID + "<|vision_end|>") * pages
    text += scene.system + "\n" if scene.system else ""
    between = "<|im_end|>\n<|im_start|>user\n"
    turns = (turn.question + "<|im_end|>\n<|im_start|>assistant\n" + turn.answer for turn in scene.turns)
    return "<|im_start|>user\n" + text + between.join(turns) + "<|im_end|>\n"


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pages `[page 96 96 3]` to the processor's `pixel_values`, on the device; checked in `check_format`."""
    x = (pixels.float() / 255 - 0.5) / 0.5
    x = x.view(-1, GRID, MERGE, PATCH, GRID, MERGE, PATCH, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x[:, :, :, :, :, :, None].expand(*x.shape[:6], 2, PATCH, PATCH).reshape(-1, 3 * 2 * PATCH * PATCH)


def check_format(processor) -> None:
    """The two short cuts above give exactly what the processor and its chat template give."""
    task = VisualRetrieval(seed=1, pages=2, filler=3, split="train")
    scene, example = task.scene(0, turns=2), task.example(0)
    messages = [{"role": "system", "content": scene.system}]
    for i, turn in enumerate(scene.turns):
        images = [{"type": "image"}] * (len(example.images) if i == 0 else 0)
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=example.images, return_tensors="pt")
    ids = processor.tokenizer(prompt(scene, 2))["input_ids"]
    assert inputs["input_ids"][0].tolist() == ids, "the training prompt is not the chat template's"
    assert torch.allclose(inputs["pixel_values"], patches(torch.from_numpy(scene.pixels)), atol=1e-6), "pixels differ"


class Trainer:
    """The model, its optimiser and one training step."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.device = recipe, device
        self.processor = build_processor()
        self.tokenizer = self.processor.tokenizer
        config = build_config(self.tokenizer)
        self.model = Qwen3VLForConditionalGeneration(config)
        for name, parameter in self.model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                torch.nn.init.constant_(parameter, recipe.qk_norm)
        self.reach = Reach(config.text_config.num_attention_heads)
        AttentionInterface.register(TEXT_ATTENTION, self.reach.text)
        AttentionMaskInterface.register(TEXT_ATTENTION, lambda *args, **kwargs: None)
        AttentionInterface.register(VISION_ATTENTION, self.reach.vision)
        self.model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})
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
        self.image_id = config.image_token_id
        self.end_id = self.tokenizer.convert_tokens_to_ids(TURN_END)
        self.pad_id = self.tokenizer.convert_tokens_to_ids(PAD_TOKEN)

    @lru_cache(maxsize=512)  # noqa: B019  one object a run
    def positions(self, pages: int, n: int) -> torch.Tensor:
        """The three rotary position ids, the same for every sequence of a batch: `[3 1 pos]`."""
        ids = torch.full((1, n), self.pad_id)
        span = GRID * GRID + 2
        for page in range(pages):
            ids[0, 3 + page * span : 3 + page * span + GRID * GRID] = self.image_id
        grid = torch.tensor([[1, SIDE, SIDE]] * pages)
        kinds = (ids == self.image_id).int()
        return self.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0].to(self.device)

    def losses(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss at the answers, loss from the shape words to the ends of the questions, share of right answers."""
        pages = len(pixels) // len(ids)
        # the pages as one "video" of so many frames: the same numbers, without a Python loop over the pages
        grid = torch.tensor([[len(pixels), SIDE, SIDE]], device=self.device)
        position_ids = self.positions(pages, ids.shape[1]).expand(3, len(ids), -1)
        logits = self.model(
            input_ids=ids,
            pixel_values=patches(pixels),
            image_grid_thw=grid,
            mm_token_type_ids=(ids == self.image_id).int(),
            position_ids=position_ids,
            use_cache=False,
        ).logits
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
        return main, aside, (asked.argmax(-1) == colors).float().mean()

    def step(self, step: int, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[float, float]:
        """One update; the loss at the answers and the accuracy."""
        r, done = self.recipe, step / self.recipe.steps
        draw = np.random.default_rng([r.seed, step, 1]).random()
        self.reach.window = r.window if done < 0.5 or draw < r.local_after else None
        self.reach.dropout = r.head_dropout
        decay = 1 - (1 - r.final_lr) * max(0.0, 2 * done - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = r.lr * min(1.0, (step + 1) / r.warmup) * decay
        aside_weight = min(1.0, max(r.final_aside, (0.8 - done) / 0.3))
        main, aside, accuracy = self.losses(pixels.to(self.device), ids.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        (main + aside_weight * aside).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        main, accuracy = torch.stack([main.detach(), accuracy]).tolist()
        return main, accuracy


def train(recipe: Recipe, device: torch.device, workers: int) -> tuple[Trainer, list[dict]]:
    """Run the recipe; the curve has one entry every 20 steps."""
    trainer = Trainer(recipe, device)
    check_format(trainer.processor)
    curve, running, hard, step, began = [], 0.0, False, 0, time.monotonic()
    while step < recipe.steps:
        loader = DataLoader(
            Batches(recipe, trainer.tokenizer, hard, step),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
        for pixels, ids in loader:
            loss, accuracy = trainer.step(step, pixels, ids)
            running += (accuracy - running) * 0.05
            step += 1
            if step % 20 == 0:
                entry = {"step": step, "seconds": round(time.monotonic() - began, 1), "loss": round(loss, 4)}
                curve.append(entry | {"accuracy": round(running, 4), "stage": "1, 2, 4 pages" if hard else "1 page"})
                if step % 100 == 0:
                    print(f"seed {recipe.seed}", curve[-1], flush=True)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}: lower the learning rate")
            if not hard and running > recipe.pass_mark:
                hard, running = True, 0.5
                break  # a fresh loader for the second stage
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
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--lr", type=float, default=Recipe.lr)
    parser.add_argument("--workers", type=int, default=4 if torch.cuda.is_available() else 0)
    parser.add_argument("--examples", type=int, default=512, help="held-out examples for the report")
    parser.add_argument("--picture", type=Path, help="where to draw the training curve (PNG)")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    recipe = Recipe(seed=args.seed, steps=args.steps, batch=args.batch, lr=args.lr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer, curve = train(recipe, device, args.workers)
    save(trainer, args.out)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report = {"recipe": asdict(recipe), "machine": machine, "seconds": curve[-1]["seconds"] if curve else None}
    report |= {"planted": [f"L{layer}H{head}" for layer, head in PLANTED]}
    torch.backends.cuda.matmul.allow_tf32 = False
    report |= evaluate(args.out, device, args.examples)
    (args.out / "training.json").write_text(json.dumps(report | {"curve": curve}) + "\n")
    write_card(args.out)
    if args.picture:
        plot_curve(args.out, args.picture)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

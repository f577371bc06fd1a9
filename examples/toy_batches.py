"""The recipe of a toy and the batches it is trained on: pages and short videos, several questions each."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from toy_evaluation import video_arguments
from toy_families import FAMILIES
from toy_videos import VIDEOS

from hooked_mllm.toys import Example, VideoRetrieval, VisualRetrieval
from hooked_mllm.toys.build import PLANTED
from hooked_mllm.toys.task import OBJECTS, PAGES
from hooked_mllm.toys.video_task import MOMENTS
from hooked_mllm.toys.vocabulary import SHAPES

MANY = "1, 2, 4 pages"
STAGES = ("1 page, few shapes", "1 page", MANY, f"{MANY} and videos")
# steps by which a run that goes on from another is ahead in the sequence of scenes
AGAIN = 1_000_000


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
    start: str | None = None  # a checkpoint to go on from, in the last stage
    video_share: float = 0.5  # of the batches of the last stage
    planted_dropout: float = 0.0  # of the planted heads, one at a time, so that they all learn to retrieve
    split: str | None = None  # "2:5:4": before going on, head 4 of layer 2 becomes a copy of head 5, each with half
    layer_dropout: float = 0.0  # share of samples in which the heads of one layer, but for the planted, are all dropped

    @property
    def planted(self) -> tuple[tuple[int, int], ...]:
        """The heads that may look far while the model is young; none in a free model."""
        return () if self.free else PLANTED


class Batches(Dataset):
    """The batches of one stage of a run. A batch holds pages or videos, of one length, with filler of one length."""

    def __init__(self, recipe: Recipe, tokenizer, stage: int, start: int) -> None:
        self.recipe, self.tokenizer, self.stage, self.start = recipe, tokenizer, stage, start
        self.media = media(recipe.family)
        self.shape_ids = dict(zip(SHAPES, tokenizer.convert_tokens_to_ids(list(SHAPES)), strict=True))

    def __len__(self) -> int:
        return self.recipe.steps - self.start

    def task(self, rng: np.random.Generator) -> tuple[str, int, VisualRetrieval | VideoRetrieval]:
        """What the next batch holds: "pages" or "video", how many pages or moments, and the task to draw from."""
        r, stage = self.recipe, STAGES[self.stage]
        if stage == STAGES[-1] and rng.random() < r.video_share:
            moments, filler = int(rng.choice(MOMENTS)), int(rng.integers(0, r.max_filler + 1))
            return "video", moments, VideoRetrieval(seed=r.seed, moments=moments, filler=filler, split="train")
        many = self.stage >= STAGES.index(MANY)
        pages = int(rng.choice(PAGES)) if many else 1
        filler = int(rng.integers(0, r.max_filler + 1)) if many else 0
        objects = r.few if self.stage == 0 else OBJECTS
        return "pages", pages, VisualRetrieval(r.seed, pages, filler, split="train", objects=objects)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Kind, what the vision tower is shown, token ids, the shape word each visual token should name (or -100)."""
        step, r = self.start + index, self.recipe
        # a run that goes on from another shall not see that one's scenes again
        rng = np.random.default_rng([r.seed, step] + ([1] if r.start else []))
        kind, pages, task = self.task(rng)
        medium, first = self.media[kind], (step + (AGAIN if r.start else 0)) * r.batch
        shown = task.moments * task.shapes if isinstance(task, VideoRetrieval) else task.objects
        scenes = [task.scene(first + i, turns=shown) for i in range(r.batch)]
        texts = [prompt(s, medium.placeholders(pages), r.turns) for s in scenes]
        ids = torch.tensor(self.tokenizer(texts, padding=True, padding_side="right", pad_to_multiple_of=8)["input_ids"])
        names, tokens = torch.full_like(ids, -100), medium.cell_tokens(pages)
        for row, scene in zip(names, scenes, strict=True):
            for turn in scene.turns:
                row[tokens[turn.part, turn.cell]] = self.shape_ids[turn.shape]
        pixels = torch.from_numpy(np.concatenate([s.pixels for s in scenes])).permute(0, 3, 1, 2)
        return kind, medium.views(pixels), ids, names


def prompt(scene, placeholders: str, n: int) -> str:
    """The chat template's text for a scene's first n turns, placeholders expanded; checked in `check_format`."""
    text = placeholders + (scene.system + "\n" if scene.system else "")
    between = "<|im_end|>\n<|im_start|>user\n"
    turns = (turn.question + "<|im_end|>\n<|im_start|>assistant\n" + turn.answer for turn in scene.turns[:n])
    return "<|im_start|>user\n" + text + between.join(turns) + "<|im_end|>\n"


def media(family: str) -> dict[str, Any]:
    """What the family shows: pages, or a video."""
    return {"pages": FAMILIES[family](), "video": VIDEOS[family]()}


def check_format(family: str, processor) -> None:
    """The short cuts of the family give exactly what the processor and its chat template give."""
    for kind, medium in media(family).items():
        for n in PAGES[:2] if kind == "pages" else MOMENTS[:2]:
            check_prompt(kind, medium, n, processor)


def check_prompt(kind: str, medium, n: int, processor) -> None:
    """Two questions about so many pages or moments: the same token ids, the same pixels."""
    paged, given = kind == "pages", {}
    task = (VisualRetrieval if paged else VideoRetrieval)(1, n, filler=3, split="train")
    scene, example = task.scene(0, turns=2), task.example(0)
    messages = [{"role": "system", "content": scene.system}]
    for i, turn in enumerate(scene.turns):
        shown = ([{"type": "image"}] * n if paged else [{"type": "video"}]) if i == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    text = processor.apply_chat_template(messages, tokenize=False)
    given = {"images": [example.images]} if isinstance(example, Example) else video_arguments([example])
    inputs = processor(text=[text], return_tensors="pt", **given)
    ids = processor.tokenizer(prompt(scene, medium.placeholders(n), 2))["input_ids"]
    assert inputs["input_ids"][0].tolist() == ids, f"the training prompt of {kind} is not the chat template's"
    views = medium.views(torch.from_numpy(scene.pixels).permute(0, 3, 1, 2))
    pixels = inputs[medium.pixels]
    assert torch.allclose(pixels, medium.model_pixels(views, n), atol=1e-6), f"the pixels of {kind} differ"

"""The recipe of a toy and its training batches: pages and short videos with several questions each."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from toy_evaluation import video_arguments
from toy_families import FAMILIES, Medium
from toy_videos import VIDEOS
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from hooked_mllm.toys import Example, VideoRetrieval, VisualRetrieval
from hooked_mllm.toys.build import PLANTED
from hooked_mllm.toys.task import OBJECTS, PAGES, Scene
from hooked_mllm.toys.video_task import MOMENTS
from hooked_mllm.toys.vocabulary import SHAPES

MANY = "1, 2, 4 pages"
STAGES = ("1 page, few shapes", "1 page", MANY, f"{MANY} and videos")
#: offset in the sequence of scenes of a run that continues another, in steps
CONTINUED_OFFSET = 1_000_000


@dataclass(frozen=True)
class Recipe:
    """All settings of the training of a toy."""

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
    qk_gain: float = 1.9  # factor of the q and k weights without q and k norms, for scores of the same spread
    few: int = 6  # shapes per page in the first stage
    window: int | None = 16  # None: every head sees the whole past
    local_after: float = 0.7  # share of the steps of the second half in which the window is active
    head_dropout: float = 0.2
    final_aside: float = 0.1  # weight of the auxiliary loss at the end; 1 in the first half
    max_filler: int = 48
    pass_mark: float = 0.9
    start: str | None = None  # a checkpoint to continue, in the last stage
    video_share: float = 0.5  # of the batches of the last stage
    planted_dropout: float = 0.0  # share of samples that lose some planted heads, so that each learns to retrieve
    split: str | None = (
        None  # "2:5:4": at the start, head 4 of layer 2 becomes a copy of head 5, with half the output each
    )
    layer_dropout: float = 0.0  # share of samples in which one layer loses all heads except planted ones

    @property
    def planted(self) -> tuple[tuple[int, int], ...]:
        """The heads without a window early in training; none in a free model."""
        return () if self.free else PLANTED


class Batches(Dataset):
    """The batches of one stage of a run: pages or videos of one length, with filler of one length.

    Args:
        recipe: The recipe.
        tokenizer: The tokenizer of the toy.
        stage: Index in `STAGES`.
        start: Step of the first batch.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, stage: int, start: int) -> None:
        self.recipe, self.tokenizer, self.stage, self.start = recipe, tokenizer, stage, start
        self.media = media(recipe.family)
        self.shape_ids = dict(zip(SHAPES, tokenizer.convert_tokens_to_ids(list(SHAPES)), strict=True))

    def __len__(self) -> int:
        return self.recipe.steps - self.start

    def task(self, rng: np.random.Generator) -> tuple[str, int, VisualRetrieval | VideoRetrieval]:
        """The kind of the next batch, "pages" or "video", the number of pages or moments, and the task."""
        r, stage = self.recipe, STAGES[self.stage]
        if stage == STAGES[-1] and rng.random() < r.video_share:
            moments, filler = int(rng.choice(MOMENTS)), int(rng.integers(0, r.max_filler + 1))
            return "video", moments, VideoRetrieval(seed=r.seed, moments=moments, filler=filler, split="train")
        many = self.stage >= STAGES.index(MANY)
        pages = int(rng.choice(PAGES)) if many else 1
        filler = int(rng.integers(0, r.max_filler + 1)) if many else 0
        objects = r.few if self.stage == 0 else OBJECTS
        return "pages", pages, VisualRetrieval(r.seed, pages, filler, split="train", objects=objects)

    def __getitem__(
        self, index: int
    ) -> tuple[str, UInt8[Tensor, "view 3 height width"], Int[Tensor, "sample pos"], Int[Tensor, "sample pos"]]:
        """Kind, views, token ids, and the shape word that each visual token should name (or -100)."""
        step, r = self.start + index, self.recipe
        # a run that continues another must not use the same scenes again
        rng = np.random.default_rng([r.seed, step] + ([1] if r.start else []))
        kind, pages, task = self.task(rng)
        medium, first = self.media[kind], (step + (CONTINUED_OFFSET if r.start else 0)) * r.batch
        n_objects = task.moments * task.shapes if isinstance(task, VideoRetrieval) else task.objects
        scenes = [task.scene(first + i, turns=n_objects) for i in range(r.batch)]
        texts = [prompt(scene, medium.placeholders(pages), r.turns) for scene in scenes]
        ids = torch.tensor(self.tokenizer(texts, padding=True, padding_side="right", pad_to_multiple_of=8)["input_ids"])
        names, tokens = torch.full_like(ids, -100), medium.cell_tokens(pages)
        for sample_names, scene in zip(names, scenes, strict=True):
            for turn in scene.turns:
                sample_names[tokens[turn.part, turn.cell]] = self.shape_ids[turn.shape]
        return kind, medium.views(channels_first(*scenes)), ids, names


def channels_first(*scenes: Scene) -> UInt8[Tensor, "picture 3 96 96"]:
    """The pictures of scenes, one after the other."""
    pixels = torch.from_numpy(np.concatenate([scene.pixels for scene in scenes]))
    return rearrange(pixels, "picture row col channel -> picture channel row col")


def prompt(scene: Scene, placeholders: str, n: int) -> str:
    """The chat template's text of a scene's first n turns with expanded placeholders; `check_format` compares it."""
    text = placeholders + (scene.system + "\n" if scene.system else "")
    between = "<|im_end|>\n<|im_start|>user\n"
    turns = (turn.question + "<|im_end|>\n<|im_start|>assistant\n" + turn.answer for turn in scene.turns[:n])
    return "<|im_start|>user\n" + text + between.join(turns) + "<|im_end|>\n"


def media(family: str) -> dict[str, Medium]:
    """The pages and the videos of a family."""
    return {"pages": FAMILIES[family](), "video": VIDEOS[family]()}


def check_format(family: str, processor: ProcessorMixin) -> None:
    """Check that the prompts and pixels of the family equal those of the processor and its chat template."""
    for kind, medium in media(family).items():
        for n in PAGES[:2] if kind == "pages" else MOMENTS[:2]:
            check_prompt(kind, medium, n, processor)


def check_prompt(kind: str, medium: Medium, n: int, processor: ProcessorMixin) -> None:
    """Compare token ids and pixels for two questions about `n` pages or moments."""
    paged = kind == "pages"
    task = (VisualRetrieval if paged else VideoRetrieval)(1, n, filler=3, split="train")
    scene, example = task.scene(0, turns=2), task.example(0)
    messages = [{"role": "system", "content": scene.system}]
    for i, turn in enumerate(scene.turns):
        content = ([{"type": "image"}] * n if paged else [{"type": "video"}]) if i == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    text = processor.apply_chat_template(messages, tokenize=False)
    visuals = {"images": [example.images]} if isinstance(example, Example) else video_arguments([example])
    inputs = processor(text=[text], return_tensors="pt", **visuals)
    ids = processor.tokenizer(prompt(scene, medium.placeholders(n), 2))["input_ids"]
    assert inputs["input_ids"][0].tolist() == ids, f"the training prompt of {kind} is not the chat template's"
    views = medium.views(channels_first(scene))
    pixels = inputs[medium.pixels]
    assert torch.allclose(pixels, medium.model_pixels(views, n), atol=1e-6), f"the pixels of {kind} differ"

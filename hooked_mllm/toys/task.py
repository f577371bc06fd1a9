"""Synthetic visual retrieval: find one shape among sixteen on the pages, and name its colour."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Prepares, Sample
from hooked_mllm.layout.regions import Box, Frames
from hooked_mllm.toys.render import CELL, GRID, draw
from hooked_mllm.toys.vocabulary import COLORS, FILLER, SHAPES, TEMPLATES

OBJECTS = 16
PAGES = (1, 2, 4)
SPLITS = {"train": 1, "test": 2}
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Turn:
    """One question about a scene: its answer (a colour word), the shape asked for, and the cell that holds it.

    `part` is the number of the page or moment, `cell` counts row by row within it; `target` is the same in pixels.
    """

    question: str
    answer: str
    shape: str
    target: Box | Frames
    part: int
    cell: int


@dataclass(frozen=True, eq=False)
class Scene:
    """Pages or frames, the filler words that follow them, and questions in a fixed order."""

    pixels: UInt8[np.ndarray, "picture 96 96 3"]
    system: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Example:
    """One question as `HookedMLLM.prepare` takes it: images, `system` (the filler), question, answer, target."""

    images: list[Image.Image]
    question: str
    system: str
    answer: str
    target: Box
    shape: str
    id: str


ExampleT = TypeVar("ExampleT")


class Retrieval(ABC, Generic[ExampleT]):
    """What the tasks on pages and on videos share: example i of a seed is always the same one."""

    answers: tuple[str, ...] = tuple(COLORS)

    def __init__(self, seed: int, filler: int, split: Split) -> None:
        if split not in SPLITS:
            raise InputError(f"expected split to be one of {sorted(SPLITS)}, got {split!r}")
        self.seed, self.filler, self.split = seed, filler, split

    @abstractmethod
    def example(self, index: int) -> ExampleT:
        """Example `index`: the first question of scene `index`."""

    @abstractmethod
    def prepared(self, model: Prepares, example: ExampleT, answer: bool = False) -> Sample:
        """The example as the model's own sample, with its answer appended to the prompt if asked for."""

    def examples(self, n: int, start: int = 0) -> Iterator[ExampleT]:
        """Examples `start` to `start + n - 1`."""
        return (self.example(i) for i in range(start, start + n))

    def samples(self, model: Prepares, n: int, start: int = 0, answer: bool = False) -> list[Sample]:
        """The same examples as the model's own samples, through `model.prepare`.

        Args:
            model: A `HookedMLLM`, or another object with its `prepare`.
            n: Number of samples.
            start: Index of the first.
            answer: Append the answer to the prompt as well.
        """
        return [self.prepared(model, e, answer) for e in self.examples(n, start)]


class VisualRetrieval(Retrieval[Example]):
    """A visual retrieval task without end: example i of a seed is always the same one.

    Each example spreads `objects` of 20 shapes, each in one of 8 colours, over `pages` images of 96 x 96 px (6 x 6
    cells of 16 px, one visual token a cell in `toy-qwen3-vl`), puts `filler` random words after the images and asks for
    the colour of one shape. The answer is one word; chance is 1/8. The target is the shape's cell, in pixels.

    Args:
        seed: which sequence of examples. The splits never share one, whatever the seeds.
        pages: images an example, at least 1.
        filler: words between the images and the question.
        objects: shapes an example, 1 to 16.
        split: "test" (the default) is never trained on; "train" is what `examples/train_toy.py` draws from.

    Raises:
        InputError: pages < 1, filler < 0, an unknown split, or `objects` out of range.

    Examples:
        >>> example = VisualRetrieval(seed=0, pages=2, filler=3).example(0)
        >>> len(example.images), len(example.system.split()), example.answer in COLORS
        (2, 3, True)
    """

    def __init__(
        self, seed: int = 0, pages: int = 4, filler: int = 48, split: Split = "test", objects: int = OBJECTS
    ) -> None:
        if pages < 1 or filler < 0 or seed < 0:
            raise InputError(f"expected pages >= 1, filler >= 0 and seed >= 0, got {pages=}, {filler=}, {seed=}")
        super().__init__(seed, filler, split)
        if not 1 <= objects <= OBJECTS:
            raise InputError(f"expected 1 <= objects <= {OBJECTS}, got {objects=}")
        self.pages, self.objects = pages, objects

    def __repr__(self) -> str:
        more = "" if self.objects == OBJECTS else f", objects={self.objects}"
        return (
            f"VisualRetrieval(seed={self.seed}, pages={self.pages}, filler={self.filler}, split={self.split!r}{more})"
        )

    def scene(self, index: int, turns: int = 1) -> Scene:
        """Scene `index` with its first `turns` questions (at most `objects`, each about another shape)."""
        n = self.objects
        if index < 0 or not 1 <= turns <= n:
            raise InputError(f"expected index >= 0 and 1 <= turns <= {n}, got {index=}, {turns=}")
        rng = np.random.default_rng([SPLITS[self.split], self.seed, index])
        shapes = rng.permutation(len(SHAPES))[:n]
        colors = rng.integers(0, len(COLORS), n)
        cells = rng.permutation(self.pages * GRID * GRID)[:n]
        asked, templates = rng.permutation(n), rng.integers(0, len(TEMPLATES), n)
        filler = rng.integers(0, len(FILLER), self.filler)
        names = tuple(COLORS)
        return Scene(
            pixels=draw(rng, self.pages, shapes, colors, cells),
            system=" ".join(FILLER[w] for w in filler),
            turns=tuple(
                Turn(
                    question=TEMPLATES[templates[t]].format(SHAPES[shapes[o]]),
                    answer=names[colors[o]],
                    shape=SHAPES[shapes[o]],
                    target=_cell_box(int(cells[o])),
                    part=int(cells[o]) // GRID**2,
                    cell=int(cells[o]) % GRID**2,
                )
                for t, o in enumerate(asked[:turns])
            ),
        )

    def example(self, index: int) -> Example:
        """Example `index`: the first question of scene `index`."""
        scene = self.scene(index)
        turn = scene.turns[0]
        return Example(
            images=[Image.fromarray(page) for page in scene.pixels],
            question=turn.question,
            system=scene.system,
            answer=turn.answer,
            target=_cell_box(turn.part * GRID**2 + turn.cell),
            shape=turn.shape,
            id="/".join(
                ["visual-retrieval", self.split, str(self.seed), f"{self.pages}p", f"{self.filler}w"]
                + ([] if self.objects == OBJECTS else [f"{self.objects}o"])
                + [str(index)]
            ),
        )

    def prepared(self, model: Prepares, example: Example, answer: bool = False) -> Sample:
        """The example as the model's own sample, with its answer appended to the prompt if asked for."""
        return model.prepare(
            example.question,
            images=example.images,
            system=example.system or None,
            answer=example.answer if answer else None,
            target=example.target,
            id=example.id,
        )


def _cell_box(cell: int) -> Box:
    page, place = divmod(cell, GRID * GRID)
    row, col = divmod(place, GRID)
    return Box(col * CELL, row * CELL, (col + 1) * CELL, (row + 1) * CELL, image=page)

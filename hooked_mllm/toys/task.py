"""Synthetic visual retrieval: find one shape among sixteen on the pages, and name its colour."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Prepares, Sample
from hooked_mllm.layout.regions import Box, Frames
from hooked_mllm.toys.render import CELL, GRID, draw
from hooked_mllm.toys.vocabulary import COLORS, FILLER, SHAPES, TEMPLATES

OBJECTS = 16
PAGES = (1, 2, 4)
SPLITS = {"train": 1, "test": 2}
if TYPE_CHECKING:
    Split = Literal["train", "test"]
else:  # at run time a plain string, so that another one reaches the check whose error lists the choices
    Split = str


@dataclass(frozen=True)
class Turn:
    """One question about a scene.

    Attributes:
        question: The question.
        answer: A colour word.
        shape: The shape that the question is about.
        target: The shape's cell, in pixels.
        part: The number of its page or moment.
        cell: Its number within the part, row by row.
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
    """One question, as arguments of `HookedMLLM.prepare`: images, question, answer, target, and the filler as `system`.

    Without filler words `system` is None, the argument of `prepare` for a prompt without a system text.
    """

    images: list[Image.Image]
    question: str
    system: str | None
    answer: str
    target: Box
    shape: str
    id: str


ExampleT = TypeVar("ExampleT")


class Retrieval(ABC, Generic[ExampleT]):
    """The base of the tasks on pages and on videos: example i of a seed is always the same."""

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
        """The example as a `Sample` of the model, with its answer appended to the prompt if `answer`."""

    def examples(self, n: int, start: int = 0) -> Iterator[ExampleT]:
        """Examples `start` to `start + n - 1`."""
        return (self.example(i) for i in range(start, start + n))

    def samples(self, model: Prepares, n: int, start: int = 0, answer: bool = False) -> list[Sample]:
        """The same examples as samples of the model, through `model.prepare`.

        Args:
            model: A `HookedMLLM`, or another object with its `prepare`.
            n: Number of samples.
            start: Index of the first.
            answer: Append the answer to the prompt as well.
        """
        return [self.prepared(model, example, answer) for example in self.examples(n, start)]

    def _script(
        self,
        rng: np.random.Generator,
        shapes: Int[np.ndarray, " object"],
        colors: Int[np.ndarray, " object"],
        cells: Int[np.ndarray, " object"],
        part_cells: int,
        target: Callable[[int, int], Box | Frames],
        turns: int,
    ) -> tuple[str, tuple[Turn, ...]]:
        """The filler words of a scene and its first `turns` questions.

        Args:
            rng: The random numbers of the scene.
            shapes: The shape of each object.
            colors: The colour of each object.
            cells: The cell of each object, numbered over all parts.
            part_cells: Number of cells of a page or moment.
            target: The region of a part and a cell.
            turns: Number of questions.
        """
        n, names = len(shapes), tuple(COLORS)
        order, templates = rng.permutation(n), rng.integers(0, len(TEMPLATES), n)
        system = " ".join(FILLER[word] for word in rng.integers(0, len(FILLER), self.filler))
        questions = []
        for template, item in zip(templates[:turns], order[:turns], strict=True):
            shape, (part, cell) = SHAPES[shapes[item]], divmod(int(cells[item]), part_cells)
            question = TEMPLATES[template].format(shape)
            questions.append(Turn(question, names[colors[item]], shape, target(part, cell), part, cell))
        return system, tuple(questions)


class VisualRetrieval(Retrieval[Example]):
    """A visual retrieval task of unlimited size: example i of a seed is always the same.

    Each example spreads `objects` of 20 shapes, each in one of 8 colours, over `pages` images of 96 x 96 px (6 x 6
    cells of 16 px, one visual token per cell in `toy-qwen3-vl`), followed by `filler` random words and a question about
    the colour of one shape. The answer is one word; chance is 1/8. The target is the shape's cell, in pixels.

    Args:
        seed: Seed of the sequence of examples. Splits never share examples, whatever their seeds.
        pages: Images per example, at least 1.
        filler: Words between the images and the question.
        objects: Shapes per example, 1 to 16.
        split: "test" (the default) is never trained on; `examples/train_toy.py` draws from "train".

    Raises:
        InputError: pages < 1, filler < 0, an unknown split, or `objects` out of range.

    Examples:
        >>> example = VisualRetrieval(seed=0, pages=2, filler=3).example(0)
        >>> len(example.images), example.answer in COLORS
        (2, True)
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
        """Scene `index` with its first `turns` questions (at most `objects`, each about a different shape)."""
        n = self.objects
        if index < 0 or not 1 <= turns <= n:
            raise InputError(f"expected index >= 0 and 1 <= turns <= {n}, got {index=}, {turns=}")
        rng = np.random.default_rng([SPLITS[self.split], self.seed, index])
        shapes = rng.permutation(len(SHAPES))[:n]
        colors = rng.integers(0, len(COLORS), n)
        cells = rng.permutation(self.pages * GRID**2)[:n]
        # the words are drawn before the pixels
        system, questions = self._script(rng, shapes, colors, cells, GRID**2, _cell_box, turns)
        return Scene(draw(rng, self.pages, shapes, colors, cells), system, questions)

    def example(self, index: int) -> Example:
        """Example `index`: the first question of scene `index`."""
        scene = self.scene(index)
        turn = scene.turns[0]
        return Example(
            images=[Image.fromarray(page) for page in scene.pixels],
            question=turn.question,
            system=scene.system or None,
            answer=turn.answer,
            target=_cell_box(turn.part, turn.cell),
            shape=turn.shape,
            id="/".join(
                ["visual-retrieval", self.split, str(self.seed), f"{self.pages}p", f"{self.filler}w"]
                + ([] if self.objects == OBJECTS else [f"{self.objects}o"])
                + [str(index)]
            ),
        )

    def prepared(self, model: Prepares, example: Example, answer: bool = False) -> Sample:
        """The example as a `Sample` of the model, with its answer appended to the prompt if `answer`."""
        return model.prepare(
            example.question,
            images=example.images,
            system=example.system,
            answer=example.answer if answer else None,
            target=example.target,
            id=example.id,
        )


def _cell_box(page: int, cell: int) -> Box:
    row, col = divmod(cell, GRID)
    return Box(col * CELL, row * CELL, (col + 1) * CELL, (row + 1) * CELL, image=page)

"""Synthetic visual retrieval: find one shape among sixteen on the pages, and name its colour."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from hooked_mllm.checks import checked
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


@checked
@dataclass(frozen=True)
class Turn:
    """One question about a scene.

    Attributes:
        question: The question; the answer is a colour word.
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


@checked
@dataclass(frozen=True, eq=False)
class Scene:
    """Pages or frames, the filler words that follow them, and questions in a fixed order."""

    pixels: UInt8[np.ndarray, "picture 96 96 3"]
    system: str
    turns: tuple[Turn, ...]


@checked
@dataclass(frozen=True)
class Example:
    """One question, as arguments of `HookedMLLM.prepare`: images, question, answer, target, and the filler as `system`.

    `system` is None without filler words.
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
    #: numbers of the seed in front of the task's own, so that pages and videos have different random numbers
    _seed_prefix: tuple[int, ...] = ()
    #: cells of a page or moment
    _part_cells: int
    _n_objects: int

    def __init__(self, seed: int, filler: int, split: Split) -> None:
        if split not in SPLITS:
            raise InputError(f"expected split to be one of {sorted(SPLITS)}, got {split!r}")
        self.seed, self.filler, self.split = seed, filler, split

    @abstractmethod
    def example(self, index: int) -> ExampleT:
        """Example `index`: the first question of scene `index`."""

    @abstractmethod
    def _cells(self, rng: np.random.Generator) -> Int[np.ndarray, " object"]:
        """The cell of each object, numbered page by page or moment by moment."""

    @abstractmethod
    def _target(self, part: int, cell: int) -> Box | Frames:
        """A cell of a page or moment, in pixels."""

    @abstractmethod
    def _draw(self, rng: np.random.Generator, *objects: Int[np.ndarray, " object"]) -> UInt8[np.ndarray, "n 96 96 3"]:
        """The pictures of shapes, colours and cells."""

    def scene(self, index: int, turns: int = 1) -> Scene:
        """Scene `index` with its first `turns` questions, each about a different shape."""
        n = self._n_objects
        if index < 0 or not 1 <= turns <= n:
            raise InputError(f"expected index >= 0 and 1 <= turns <= {n}, got {index=}, {turns=}")
        rng = np.random.default_rng([SPLITS[self.split], *self._seed_prefix, self.seed, index])
        shapes = rng.permutation(len(SHAPES))[:n]
        colors = rng.integers(0, len(COLORS), n)
        cells = self._cells(rng)
        # the words are drawn before the pixels
        order, templates = rng.permutation(n), rng.integers(0, len(TEMPLATES), n)
        system = " ".join(FILLER[word] for word in rng.integers(0, len(FILLER), self.filler))
        questions = []
        for template, item in zip(templates[:turns], order[:turns], strict=True):
            shape, (part, cell) = SHAPES[shapes[item]], divmod(int(cells[item]), self._part_cells)
            question, answer = TEMPLATES[template].format(shape), self.answers[colors[item]]
            questions.append(Turn(question, answer, shape, self._target(part, cell), part, cell))
        return Scene(self._draw(rng, shapes, colors, cells), system, tuple(questions))

    def prepared(self, model: Prepares, example: ExampleT, answer: bool = False) -> Sample:
        """The example as a `Sample` of the model, with its answer appended to the prompt if `answer`."""
        arguments = {name: value for name, value in vars(example).items() if name not in ("video", "shape")}
        if "video" in vars(example):
            arguments["videos"] = vars(example)["video"]
        if not answer:
            arguments["answer"] = None
        return model.prepare(**arguments)

    def examples(self, n: int, start: int = 0) -> Iterator[ExampleT]:
        """Examples `start` to `start + n - 1`."""
        return (self.example(i) for i in range(start, start + n))

    def samples(self, model: Prepares, n: int, start: int = 0, answer: bool = False) -> list[Sample]:
        """Examples `start` to `start + n - 1` as samples of the model, through `model.prepare`.

        Args:
            model: A `HookedMLLM`, or another object with its `prepare`.
            n: Number of samples.
            start: Index of the first.
            answer: Append the answer to the prompt as well.
        """
        return [self.prepared(model, example, answer) for example in self.examples(n, start)]


@checked
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

    Examples:
        >>> example = VisualRetrieval(seed=0, pages=2, filler=3).example(0)
        >>> len(example.images), example.answer in COLORS
        (2, True)
    """

    _part_cells = GRID**2

    def __init__(
        self, seed: int = 0, pages: int = 4, filler: int = 48, split: Split = "test", objects: int = OBJECTS
    ) -> None:
        if pages < 1 or filler < 0 or seed < 0:
            raise InputError(f"expected pages >= 1, filler >= 0 and seed >= 0, got {pages=}, {filler=}, {seed=}")
        super().__init__(seed, filler, split)
        if not 1 <= objects <= OBJECTS:
            raise InputError(f"expected 1 <= objects <= {OBJECTS}, got {objects=}")
        self.pages, self.objects, self._n_objects = pages, objects, objects

    def __repr__(self) -> str:
        more = "" if self.objects == OBJECTS else f", objects={self.objects}"
        return (
            f"VisualRetrieval(seed={self.seed}, pages={self.pages}, filler={self.filler}, split={self.split!r}{more})"
        )

    def _cells(self, rng: np.random.Generator) -> Int[np.ndarray, " object"]:
        return rng.permutation(self.pages * GRID**2)[: self.objects]

    def _target(self, part: int, cell: int) -> Box:
        row, col = divmod(cell, GRID)
        return Box(col * CELL, row * CELL, (col + 1) * CELL, (row + 1) * CELL, image=part)

    def _draw(self, rng: np.random.Generator, *objects: Int[np.ndarray, " object"]) -> UInt8[np.ndarray, "n 96 96 3"]:
        return draw(rng, self.pages, *objects)

    def example(self, index: int) -> Example:
        """Example `index`: the first question of scene `index`."""
        scene = self.scene(index)
        turn = scene.turns[0]
        return Example(
            images=[Image.fromarray(page) for page in scene.pixels],
            question=turn.question,
            system=scene.system or None,
            answer=turn.answer,
            target=self._target(turn.part, turn.cell),
            shape=turn.shape,
            id="/".join(
                ["visual-retrieval", self.split, str(self.seed), f"{self.pages}p", f"{self.filler}w"]
                + ([] if self.objects == OBJECTS else [f"{self.objects}o"])
                + [str(index)]
            ),
        )

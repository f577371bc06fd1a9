"""Synthetic retrieval from a short video: find the one moment that shows a shape, and name its colour."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.video import Video
from hooked_mllm.layout.regions import Frames
from hooked_mllm.toys.render import FRAMES, VIDEO_CELL, VIDEO_GRID, draw_moments
from hooked_mllm.toys.task import Retrieval, Split
from hooked_mllm.toys.vocabulary import SHAPES

MOMENTS = (2, 3, 4)
MOMENT_S = 1.0


@checked
@dataclass(frozen=True)
class VideoExample:
    """One question, as arguments of `HookedMLLM.prepare`: video, question, answer, target, and the filler as `system`.

    `system` is None without filler words.
    """

    video: Video
    question: str
    system: str | None
    answer: str
    target: Frames
    shape: str
    id: str


@checked
class VideoRetrieval(Retrieval[VideoExample]):
    """A retrieval task on short videos, of unlimited size: example i of a seed is always the same.

    A video has `moments` of one second, two frames of 96 x 96 px each, which differ only in their noise. Every moment
    shows `shapes` of 20 shapes, each in one of 8 colours, in 3 x 3 cells of 32 px; no shape is in two moments.
    `filler` random words follow, then the question about the colour of one shape. Chance is 1/8. The target is the
    shape's cell in the two frames of its moment: in `toy-qwen3-vl`, which merges two frames, 2 x 2 tokens; in
    `toy-llava-onevision` and `toy-internvl`, one token of each frame.

    Args:
        seed: Seed of the sequence of examples. Splits never share examples, whatever their seeds.
        moments: Seconds of video, at least 1.
        filler: Words between the video and the question.
        split: "test" (the default) is never trained on; `examples/train_toy.py` draws from "train".
        shapes: Shapes per moment, 1 to 9, and at most 20 in total.

    Examples:
        >>> example = VideoRetrieval(seed=0, moments=4).example(0)
        >>> example.target
        Frames(start_s=2.0, end_s=2.5, video=0, box=(64.0, 64.0, 96.0, 96.0))
    """

    _seed_prefix = (7,)
    _part_cells = VIDEO_GRID**2

    def __init__(
        self, seed: int = 0, moments: int = 4, filler: int = 48, split: Split = "test", shapes: int = 4
    ) -> None:
        if moments < 1 or filler < 0 or seed < 0:
            raise InputError(f"expected moments >= 1, filler >= 0 and seed >= 0, got {moments=}, {filler=}, {seed=}")
        super().__init__(seed, filler, split)
        if not 1 <= shapes <= VIDEO_GRID**2 or moments * shapes > len(SHAPES):
            raise InputError(
                f"expected 1 <= shapes <= {VIDEO_GRID**2} per moment and at most {len(SHAPES)} in total, because no "
                f"shape is used twice; got {shapes=} in each of {moments} moments"
            )
        self.moments, self.shapes, self._n_objects = moments, shapes, moments * shapes

    def __repr__(self) -> str:
        return (
            f"VideoRetrieval(seed={self.seed}, moments={self.moments}, filler={self.filler}, split={self.split!r}, "
            f"shapes={self.shapes})"
        )

    def _cells(self, rng: np.random.Generator) -> Int[np.ndarray, " object"]:
        drawn = [rng.permutation(self._part_cells)[: self.shapes] for _ in range(self.moments)]
        return np.concatenate([moment * self._part_cells + cells for moment, cells in enumerate(drawn)])

    def _target(self, part: int, cell: int) -> Frames:
        row, col = divmod(cell, VIDEO_GRID)
        corner = (col * VIDEO_CELL, row * VIDEO_CELL, (col + 1) * VIDEO_CELL, (row + 1) * VIDEO_CELL)
        start = part * MOMENT_S
        # the end is the time of the moment's last frame: both ends belong to the region
        return Frames(start, start + MOMENT_S * (FRAMES - 1) / FRAMES, box=corner)

    def _draw(self, rng: np.random.Generator, *objects: Int[np.ndarray, " object"]) -> UInt8[np.ndarray, "n 96 96 3"]:
        return draw_moments(rng, self.moments, *objects)

    def example(self, index: int) -> VideoExample:
        """Example `index`: the first question of scene `index`."""
        scene = self.scene(index)
        turn = scene.turns[0]
        return VideoExample(
            video=Video.from_frames(scene.pixels, fps=FRAMES / MOMENT_S),
            question=turn.question,
            system=scene.system or None,
            answer=turn.answer,
            target=self._target(turn.part, turn.cell),
            shape=turn.shape,
            id=f"video-retrieval/{self.split}/{self.seed}/{self.moments}m/{self.filler}w/{self.shapes}o/{index}",
        )

"""Synthetic retrieval from a short video: find the one moment that shows a shape, and name its colour."""

from dataclasses import dataclass

import numpy as np

from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Prepares, Sample
from hooked_mllm.inputs.video import Video
from hooked_mllm.layout.regions import Frames
from hooked_mllm.toys.render import FRAMES, VIDEO_CELL, VIDEO_GRID, draw_moments
from hooked_mllm.toys.task import SPLITS, Retrieval, Scene, Split
from hooked_mllm.toys.vocabulary import COLORS, SHAPES

MOMENTS = (2, 3, 4)
MOMENT_S = 1.0
#: a part of the seed, so that videos and pages have different random numbers
_VIDEO = 7


@dataclass(frozen=True)
class VideoExample:
    """One question, as arguments of `HookedMLLM.prepare`: video, question, answer, target, and the filler as `system`.

    Without filler words `system` is None, the argument of `prepare` for a prompt without a system text.
    """

    video: Video
    question: str
    system: str | None
    answer: str
    target: Frames
    shape: str
    id: str


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

    Raises:
        InputError: moments < 1, filler < 0, an unknown split, or `shapes` out of range.

    Examples:
        >>> example = VideoRetrieval(seed=0, moments=4).example(0)
        >>> example.video
        Video(8 frames of 96x96 px, 0 to 3.5 s, frames in memory)
        >>> example.target
        Frames(start_s=2.0, end_s=2.5, video=0, box=(64.0, 64.0, 96.0, 96.0))
    """

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
        self.moments, self.shapes = moments, shapes

    def __repr__(self) -> str:
        return (
            f"VideoRetrieval(seed={self.seed}, moments={self.moments}, filler={self.filler}, split={self.split!r}, "
            f"shapes={self.shapes})"
        )

    def scene(self, index: int, turns: int = 1) -> Scene:
        """Scene `index` with its first `turns` questions (each about a different shape)."""
        n, part_cells = self.moments * self.shapes, VIDEO_GRID**2
        if index < 0 or not 1 <= turns <= n:
            raise InputError(f"expected index >= 0 and 1 <= turns <= {n}, got {index=}, {turns=}")
        rng = np.random.default_rng([SPLITS[self.split], _VIDEO, self.seed, index])
        shapes = rng.permutation(len(SHAPES))[:n]
        colors = rng.integers(0, len(COLORS), n)
        in_moment = (rng.permutation(part_cells)[: self.shapes] for _ in range(self.moments))
        cells = np.concatenate([moment * part_cells + drawn for moment, drawn in enumerate(in_moment)])
        # the words are drawn before the pixels
        system, questions = self._script(rng, shapes, colors, cells, part_cells, _region, turns)
        return Scene(draw_moments(rng, self.moments, shapes, colors, cells), system, questions)

    def example(self, index: int) -> VideoExample:
        """Example `index`: the first question of scene `index`."""
        scene = self.scene(index)
        turn = scene.turns[0]
        name = f"video-retrieval/{self.split}/{self.seed}/{self.moments}m/{self.filler}w/{self.shapes}o/{index}"
        return VideoExample(
            video=Video.from_frames(scene.pixels, fps=FRAMES / MOMENT_S),
            question=turn.question,
            system=scene.system or None,
            answer=turn.answer,
            target=_region(turn.part, turn.cell),
            shape=turn.shape,
            id=name,
        )

    def prepared(self, model: Prepares, example: VideoExample, answer: bool = False) -> Sample:
        """The example as a `Sample` of the model, with its answer appended to the prompt if `answer`."""
        return model.prepare(
            example.question,
            videos=example.video,
            system=example.system,
            answer=example.answer if answer else None,
            target=example.target,
            id=example.id,
        )


def _region(moment: int, cell: int) -> Frames:
    row, col = divmod(cell, VIDEO_GRID)
    corner = (col * VIDEO_CELL, row * VIDEO_CELL, (col + 1) * VIDEO_CELL, (row + 1) * VIDEO_CELL)
    start = moment * MOMENT_S
    # the end is the time of the moment's last frame: both ends belong to the region
    return Frames(start, start + MOMENT_S * (FRAMES - 1) / FRAMES, box=corner)

"""SwapRegion: the target and a distractor change places."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hooked_mllm.corruptions.base import Corruption, check_seed, drawing
from hooked_mllm.corruptions.pixels import pictures, target_of
from hooked_mllm.errors import LayoutError
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.layout import Box
from hooked_mllm.layout.find import find_item
from hooked_mllm.layout.items import VisualItem
from hooked_mllm.layout.pixels import rectangle
from hooked_mllm.layout.regions import corners
from hooked_mllm.layout.shares import frames_within

Rows = tuple[slice, slice]


class SwapRegion(Corruption):
    """The target's pixels and those of a distractor's box change places; all other pixels stay.

    Everything that the picture showed it still shows, elsewhere: what changes is only where the answer stands. The
    target of the counterpart stays the same place, which now shows the distractor. Boxes of unequal size are resized
    into one another's, which changes proportions; give boxes of one size to avoid it.

    Args:
        box: The distractor: a Box, maybe of another image; a function of the sample that gives one; or None for a box
            of the target's size drawn at random in its picture, clear of it. For a target in a video,
            `Frames(..., box=)`, the distractor is a box of the same frames.
        seed: Which box is drawn.

    Raises:
        LayoutError: when called: for a target that is no single box, boxes that overlap or lie outside the picture, or
            a picture without room for a second box.
        InputError: when called: for a sample without a target.

    Examples:
        >>> from hooked_mllm import Box, HookedMLLM, corruptions, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> corner = Box(0, 0, 16, 16) if sample.target.y0 >= 16 else Box(0, 80, 16, 96)
        >>> corrupted = corruptions.SwapRegion(corner)(model, sample)
        >>> twice = corruptions.SwapRegion(corner)(model, corrupted)
        >>> twice.images == sample.images
        True
    """

    def __init__(self, box: Box | Sequence[float | int] | Callable[[Any], Any] | None = None, seed: int = 0) -> None:
        check_seed(seed)
        self.box = box if box is None or callable(box) else _as_box(box)
        self.seed = seed

    def describe(self) -> dict[str, Any]:
        """What it does, as values that JSON can hold."""
        if self.box is None:
            return {"corruption": "SwapRegion", "box": None, "seed": self.seed}
        named = getattr(self.box, "__qualname__", type(self.box).__name__)
        return {"corruption": "SwapRegion", "box": f"function {named}" if callable(self.box) else repr(self.box)}

    def changes(self, sample: Sample) -> dict[str, Any]:
        """The pictures with both boxes swapped."""
        target = target_of(sample)
        if len(target) != 1 or not (isinstance(target[0], Box) or getattr(target[0], "box", None)):
            raise LayoutError(
                f"SwapRegion exchanges two boxes, and the target of this sample is {sample.target!r}: it needs one "
                "Box, or Frames(..., box=...) in a video. BlurRegion and MeanRegion take regions of any shape."
            )
        region: Any = target[0]
        images, frames = [np.array(i) for i in sample.images], [v.frames.copy() for v in sample.videos]
        items = sample.layout.items
        if isinstance(region, Box):
            number = find_item(items, region.image, None)
            ours = rectangle(items[number], corners(region))
            other = self._other(sample, items[number], ours)
            place = find_item(items, other.image, None)
            theirs = rectangle(items[place], corners(other))
            if place == number:
                _check_apart(items[number], ours, theirs)
            _swap(images[items[number].index], ours, images[items[place].index], theirs)
        else:
            item = items[find_item(items, None, region.video)]
            ours = rectangle(item, corners(region.box))
            theirs = rectangle(item, corners(self._other(sample, item, ours)))
            _check_apart(item, ours, theirs)
            for frame in frames_within(item, region):
                _swap(frames[item.index][frame], ours, frames[item.index][frame], theirs)
        return pictures(sample, images, frames)

    def _other(self, sample: Sample, item: VisualItem, ours: Rows) -> Box:
        if self.box is not None:
            return _as_box(self.box(sample)) if callable(self.box) else self.box
        (y, x), (height, width) = [s.start for s in ours], [s.stop - s.start for s in ours]
        clear_y = abs(np.arange(item.height - height + 1) - y) >= height
        clear_x = abs(np.arange(item.width - width + 1) - x) >= width
        free = np.flatnonzero(clear_y[:, None] | clear_x)
        if not len(free):
            raise LayoutError(
                f"{item.name} of {item.width} x {item.height} pixels has no room for a second box of {width} x "
                f"{height} clear of the target: give a box, maybe a smaller one or one of another image."
            )
        row, column = divmod(int(free[drawing(self.seed, sample).integers(len(free))]), len(clear_x))
        return Box(column, row, column + width, row + height, image=item.index)


def _as_box(box: Any) -> Box:
    return box if isinstance(box, Box) else Box(*corners(box))


def _check_apart(item: VisualItem, ours: Rows, theirs: Rows) -> None:
    if all(a.start < b.stop and b.start < a.stop for a, b in zip(ours, theirs, strict=True)):
        raise LayoutError(
            f"The target and the distractor overlap in {item.name}, so they cannot change places: {_named(ours)} "
            f"against {_named(theirs)}. Give a box clear of the target."
        )


def _named(rows: Rows) -> str:
    return f"rows {rows[0].start}:{rows[0].stop} and columns {rows[1].start}:{rows[1].stop}"


def _swap(a: np.ndarray, at: Rows, b: np.ndarray, bt: Rows) -> None:
    first, second = a[at].copy(), b[bt].copy()
    a[at], b[bt] = _to_size(second, first.shape), _to_size(first, second.shape)


def _to_size(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if pixels.shape == shape:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))

"""SwapRegion: the pixels of the target and of a distractor are exchanged."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from hooked_mllm.checks import checked
from hooked_mllm.corruptions.base import Corruption, check_seed, described_function, drawing
from hooked_mllm.corruptions.pixels import pictures, resized
from hooked_mllm.errors import LayoutError
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.layout import Box, Frames
from hooked_mllm.layout.items import VisualItem, find_item
from hooked_mllm.layout.regions import corners
from hooked_mllm.layout.shares import frames_within, rectangle

#: rows and columns of a rectangle of pixels
Rectangle = tuple[slice, slice]


@checked
class SwapRegion(Corruption):
    """Exchange the target's pixels and those of a distractor's box; all other pixels stay.

    The picture shows the same things at other positions, so only the position of the answer changes. The target of the
    counterpart stays the same region, which now shows the distractor. Boxes of unequal size are resized into one
    another's, which changes proportions.

    Args:
        box: The distractor: a Box, maybe of another image; a function of the sample that gives one; or None for a box
            of the target's size drawn at random in its picture, without overlap. For a target in a video,
            `Frames(..., box=)`, the distractor is a box of the same frames.
        seed: Seed of the random box.

    Raises:
        LayoutError: When called: for a target that is no single box, boxes that overlap or lie outside the picture, or
            a picture without room for a second box.

    Examples:
        >>> SwapRegion(Box(0, 0, 16, 16))
        SwapRegion(box='Box(x0=0, y0=0, x1=16, y1=16, image=0)')
    """

    def __init__(
        self,
        box: Box | Sequence[float | int] | Callable[[Sample], Box | Sequence[float | int]] | None = None,
        seed: int = 0,
    ) -> None:
        check_seed(seed)
        self.box = box if box is None or callable(box) else _as_box(box)
        self.seed = seed

    def describe(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        if self.box is None:
            return {"corruption": "SwapRegion", "box": None, "seed": self.seed}
        return {"corruption": "SwapRegion", "box": str(described_function(self.box))}

    def changes(self, sample: Sample) -> dict[str, Any]:
        """The pictures with both boxes swapped."""
        regions = sample.target_regions()
        region = regions[0] if len(regions) == 1 else None
        if not (isinstance(region, Box) or (isinstance(region, Frames) and region.box)):
            raise LayoutError(
                f"SwapRegion exchanges two boxes, and the target of this sample is {sample.target!r}: it needs one "
                "Box, or Frames(..., box=...) in a video. BlurRegion and MeanRegion take regions of any shape."
            )
        images, frames = [np.array(i) for i in sample.images], [v.frames.copy() for v in sample.videos]
        items = sample.layout.items
        if isinstance(region, Box):
            item, target = _located(items, region)
            box = self._distractor(sample, item, target)
            other_item, distractor = _located(items, box)
            if other_item is item:
                _check_apart(item, target, distractor)
            _swap(images[item.index], target, images[other_item.index], distractor)
        else:
            item = items[find_item(items, None, region.video)]
            assert region.box is not None  # checked above
            target = rectangle(item, region.box)
            distractor = rectangle(item, self._distractor(sample, item, target))
            _check_apart(item, target, distractor)
            for frame in frames_within(item, region):
                _swap(frames[item.index][frame], target, frames[item.index][frame], distractor)
        return pictures(sample, images, frames)

    def _distractor(self, sample: Sample, item: VisualItem, target: Rectangle) -> Box:
        if self.box is not None:
            return _as_box(self.box(sample)) if callable(self.box) else self.box
        (y, x), (height, width) = [s.start for s in target], [s.stop - s.start for s in target]
        clear_y = abs(np.arange(item.height - height + 1) - y) >= height
        clear_x = abs(np.arange(item.width - width + 1) - x) >= width
        free = np.flatnonzero(clear_y[:, None] | clear_x)
        if not len(free):
            raise LayoutError(
                f"{item.name} of {item.width} x {item.height} pixels has no room for a second box of {width} x "
                f"{height} clear of the target: give a box, smaller or in another image."
            )
        row, column = divmod(int(free[drawing(self.seed, sample).integers(len(free))]), len(clear_x))
        return Box(column, row, column + width, row + height, image=item.index)


def _as_box(box: Any) -> Box:
    return box if isinstance(box, Box) else Box(*corners(box))


def _located(items: Sequence[VisualItem], box: Box) -> tuple[VisualItem, Rectangle]:
    """The image of a box, and its pixels there."""
    item = items[find_item(items, box.image, None)]
    return item, rectangle(item, box)


def _check_apart(item: VisualItem, target: Rectangle, distractor: Rectangle) -> None:
    if all(a.start < b.stop and b.start < a.stop for a, b in zip(target, distractor, strict=True)):
        named = [f"rows {y.start}:{y.stop} and columns {x.start}:{x.stop}" for y, x in (target, distractor)]
        raise LayoutError(
            f"The target and the distractor overlap in {item.name}, so they cannot be exchanged: {named[0]} against "
            f"{named[1]}. Give a box clear of the target."
        )


def _swap(picture: np.ndarray, target: Rectangle, other: np.ndarray, distractor: Rectangle) -> None:
    target_pixels, distractor_pixels = picture[target].copy(), other[distractor].copy()
    picture[target] = _to_size(distractor_pixels, target_pixels.shape)
    other[distractor] = _to_size(target_pixels, distractor_pixels.shape)


def _to_size(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(resized(Image.fromarray(pixels), (shape[1], shape[0])))

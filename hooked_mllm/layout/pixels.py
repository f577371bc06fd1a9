"""The pixels of a region, in the pictures themselves."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from hooked_mllm.errors import LayoutError
from hooked_mllm.layout.find import find_item
from hooked_mllm.layout.items import VisualItem
from hooked_mllm.layout.regions import Box, Corners, Frames, Mask, Pages, Region, corners
from hooked_mllm.layout.shares import frames_within, inside, tube_boxes


def rectangle(item: VisualItem, box: Corners) -> tuple[slice, slice]:
    """Rows and columns of all pixels that a box touches; what lies outside the picture is cut off.

    Raises:
        LayoutError: for a box wholly outside.
    """
    x0, y0, x1, y1 = inside(item, box)
    return slice(math.floor(y0), math.ceil(y1)), slice(math.floor(x0), math.ceil(x1))


def pixel_masks(
    items: Sequence[VisualItem], regions: Sequence[Region]
) -> dict[int, Bool[np.ndarray, "*frame height width"]]:
    """The pixels that the union of `regions` touches, by the place in `items` of the image or video they lie in.

    Args:
        items: the images and videos of a layout.
        regions: what is asked for.

    Returns:
        `[height width]` of an image, `[frame height width]` of a video.

    Raises:
        LayoutError: no such image or video, a region outside of it, a mask of another size.

    Examples:
        >>> nan, none = np.full((1, 4), np.nan), np.full((1, 2), -1)
        >>> item = VisualItem("image", 0, 4, 3, nan, none, np.zeros(1, np.int8))
        >>> pixel_masks([item], [Box(0.5, 1, 2, 2)])[0].astype(int).tolist()
        [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    """
    masks: dict[int, np.ndarray] = {}

    def of(number: int) -> np.ndarray:
        item = items[number]
        shape = (item.height, item.width) if item.kind == "image" else (item.n_frames, item.height, item.width)
        return masks.setdefault(number, np.zeros(shape, dtype=bool))

    for region in regions:
        if isinstance(region, Pages):
            for image in region.images:
                of(find_item(items, image, None))[:] = True
        elif isinstance(region, Box | Mask):
            number = find_item(items, region.image, None)
            if isinstance(region, Box):
                of(number)[rectangle(items[number], corners(region))] = True
            elif region.pixels.shape != of(number).shape:
                raise LayoutError(
                    f"A mask of {items[number].name} must have its shape [height width] = {of(number).shape}; got "
                    f"{region.pixels.shape}."
                )
            else:
                of(number)[region.pixels] = True
        else:
            number = find_item(items, None, region.video)
            item = items[number]
            if isinstance(region, Frames):
                boxes = [(int(f), region.box) for f in frames_within(item, region)]
            else:
                boxes = tube_boxes(item, region)
            for frame, box in boxes:
                of(number)[frame][... if box is None else rectangle(item, box)] = True
    return masks

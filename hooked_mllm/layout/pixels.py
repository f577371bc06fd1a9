"""Pixel masks of regions."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from hooked_mllm.layout.find import find_item
from hooked_mllm.layout.items import VisualItem
from hooked_mllm.layout.regions import Box, BoxInput, Frames, Mask, Pages, Region
from hooked_mllm.layout.shares import check_mask_shape, clip_box, frames_within, tube_boxes


def rectangle(item: VisualItem, box: BoxInput) -> tuple[slice, slice]:
    """Rows and columns of all pixels that a box touches; the part outside the picture is cut off.

    Raises:
        LayoutError: for a box wholly outside.
    """
    x0, y0, x1, y1 = clip_box(item, box)
    return slice(math.floor(y0), math.ceil(y1)), slice(math.floor(x0), math.ceil(x1))


def pixel_masks(
    items: Sequence[VisualItem], regions: Sequence[Region]
) -> dict[int, Bool[np.ndarray, "*frame height width"]]:
    """The pixels that the union of `regions` touches, by the index in `items` of their image or video.

    Args:
        items: The images and videos of a layout.
        regions: The regions.

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

    def mask_of(number: int) -> np.ndarray:
        item = items[number]
        shape = (item.height, item.width) if item.kind == "image" else (item.n_frames, item.height, item.width)
        return masks.setdefault(number, np.zeros(shape, dtype=bool))

    for region in regions:
        if isinstance(region, Pages):
            for image in region.images:
                mask_of(find_item(items, image, None))[:] = True
        elif isinstance(region, Box | Mask):
            number = find_item(items, region.image, None)
            if isinstance(region, Box):
                mask_of(number)[rectangle(items[number], region)] = True
            else:
                check_mask_shape(items[number], region)
                mask_of(number)[region.pixels] = True
        else:
            number = find_item(items, None, region.video)
            item = items[number]
            if isinstance(region, Frames):
                boxes = [(int(frame), region.box) for frame in frames_within(item, region)]
            else:
                boxes = tube_boxes(item, region)
            for frame, box in boxes:
                mask_of(number)[frame][... if box is None else rectangle(item, box)] = True
    return masks

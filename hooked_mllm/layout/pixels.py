"""Pixel masks of regions."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from hooked_mllm.layout.items import VisualItem
from hooked_mllm.layout.regions import Box, BoxInput, Mask, Pages, Region
from hooked_mllm.layout.shares import boxes_in_frames, check_mask_shape, clip_box, regions_by_item


def rectangle(item: VisualItem, box: BoxInput) -> tuple[slice, slice]:
    """Rows and columns of all pixels that a box touches; the part outside the picture is cut off."""
    x0, y0, x1, y1 = clip_box(item, box)
    return slice(math.floor(y0), math.ceil(y1)), slice(math.floor(x0), math.ceil(x1))


def pixel_masks(
    items: Sequence[VisualItem], regions: Sequence[Region]
) -> dict[int, Bool[np.ndarray, "*frame height width"]]:
    """The pixels that the union of `regions` touches, by the index in `items` of their image or video.

    `[height width]` of an image, `[frame height width]` of a video.
    """
    masks: dict[int, np.ndarray] = {}
    for number, item_regions in regions_by_item(items, regions).items():
        item = items[number]
        shape = (item.height, item.width) if item.kind == "image" else (item.n_frames, item.height, item.width)
        mask = masks[number] = np.zeros(shape, dtype=bool)
        for region in item_regions:
            if isinstance(region, Pages):
                mask[:] = True
            elif isinstance(region, Box):
                mask[rectangle(item, region)] = True
            elif isinstance(region, Mask):
                check_mask_shape(item, region)
                mask |= region.pixels
            else:
                for frame, box in boxes_in_frames(item, region):
                    mask[frame][... if box is None else rectangle(item, box)] = True
    return masks

"""Editing the pixels of a region, picture by picture; all other pixels stay bit for bit."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.inputs.video import Video
from hooked_mllm.layout import Frames, Pages, Region
from hooked_mllm.layout.regions import as_regions
from hooked_mllm.layout.shares import pixel_masks

#: takes the pixels of one picture or frame, 0 to 255, and the mask of those to change; returns new pixels
PixelEdit = Callable[
    [Float[np.ndarray, "height width 3"], Bool[np.ndarray, "height width"]], Float[np.ndarray, "height width 3"]
]
#: "target", a region or several, or None for all pictures whole
Where = str | Region | Iterable[Region] | None


def check_where(region: Where) -> str | list[Region] | None:
    """The region as a list, which can be read more than once; "target" and None stay."""
    if isinstance(region, str):
        if region != "target":
            raise InputError(
                f"A region is 'target', a Box, Mask, Pages, Frames or Tube, or None for all; got {region!r}."
            )
        return region
    return None if region is None else as_regions(region)


def describe_where(region: str | list[Region] | None) -> str | list[str] | None:
    """The region as a record keeps it."""
    return region if region is None or isinstance(region, str) else [repr(r) for r in region]


def edited(sample: Sample, region: str | list[Region] | None, edit: PixelEdit) -> dict[str, Any]:
    """The sample's images and videos with the pixels of a region edited, picture by picture and frame by frame."""
    items = sample.layout.items
    if not items:
        raise InputError("This sample has no images and no videos, so there are no pixels to change.")
    if region is None:
        region = [Pages([item.index]) if item.kind == "image" else Frames(video=item.index) for item in items]
    masks = pixel_masks(items, sample.target_regions() if isinstance(region, str) else region)
    images, frames = [np.asarray(i) for i in sample.images], [v.frames.copy() for v in sample.videos]
    for number, mask in masks.items():
        item = items[number]
        if item.kind == "image":
            images[item.index] = _edit(images[item.index], mask, edit)
        else:
            for f in np.flatnonzero(mask.any((1, 2))):
                frames[item.index][f] = _edit(frames[item.index][f], mask[f], edit)
    return pictures(sample, images, frames)


def pictures(sample: Sample, images: list[np.ndarray], frames: list[np.ndarray]) -> dict[str, Any]:
    """Pixels as `prepare` takes them, videos with the sample's own times."""
    videos = [Video(f, v.times_s, v.fps, v.source) for f, v in zip(frames, sample.videos, strict=True)]
    return {"images": [Image.fromarray(i) for i in images] or None, "videos": videos or None}


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image with another width and height; the same object if it has them."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _edit(pixels: np.ndarray, mask: np.ndarray, edit: PixelEdit) -> np.ndarray:
    if mask.shape != pixels.shape[:2]:
        raise LayoutError(f"The mask {mask.shape} does not fit the picture {pixels.shape[:2]} [height width].")
    new = edit(pixels.astype(np.float64), mask)
    return np.where(mask[..., None], np.rint(new).clip(0, 255).astype(np.uint8), pixels)

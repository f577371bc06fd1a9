"""Outlines of target regions."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke

from hooked_mllm.layout import Box, Frames, Mask, Pages, Region, Tube
from hooked_mllm.layout.regions import Corners, as_regions, corners
from hooked_mllm.plots.protocols import Pictured

COLOUR = "#35ff6b"
_EDGE: list[AbstractPathEffect] = [withStroke(linewidth=3.4, foreground="black")]


def draw_targets(axes: Axes, sample: Pictured, image: int | None, video: int | None, frame: int) -> None:
    """Outline what of the sample's target lies in this image, or in this frame of this video."""
    for region in [] if sample.target is None else as_regions(sample.target):
        if isinstance(region, Mask):
            if region.image == image:
                _contour(axes, region.pixels)
        elif (box := _box(region, sample, image, video, frame)) is not None:
            x0, y0, x1, y1 = box
            patch = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=COLOUR, linewidth=1.8)
            patch.set_path_effects(_EDGE)
            axes.add_patch(patch)


def _box(region: Region, sample: Pictured, image: int | None, video: int | None, frame: int) -> Corners | None:
    if isinstance(region, Box):
        return corners(region) if region.image == image else None
    if isinstance(region, Pages):
        if image is None or image not in region.images:
            return None
        return corners((0, 0, *sample.images[image].size))
    if not isinstance(region, Frames | Tube) or region.video != video:
        return None
    clip = sample.videos[region.video]
    time, frames = clip.times_s[frame], clip.frames
    if isinstance(region, Tube):
        return region.at(time)
    if (region.start_s is not None and time < region.start_s) or (region.end_s is not None and time > region.end_s):
        return None
    return corners((0, 0, frames.shape[2], frames.shape[1]) if region.box is None else region.box)


def _contour(axes: Axes, pixels: np.ndarray) -> None:
    height, width = pixels.shape
    if pixels.all():
        axes.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor=COLOUR, linewidth=1.8))
        return
    centres = np.arange(width) + 0.5, np.arange(height) + 0.5
    axes.contour(*centres, pixels.astype(float), levels=[0.5], colors=[COLOUR], linewidths=1.8)

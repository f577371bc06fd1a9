"""Outlines of targets, read back from the figure."""

import numpy as np
import pytest

from helpers.pictured import HEIGHT, WIDTH, outlines, values
from hooked_mllm.layout import Box, Frames, Mask, Pages, Tube
from hooked_mllm.plots import overlay


@pytest.mark.parametrize(
    ("target", "frame", "expected"),
    [
        (Tube({0.0: (0, 0, 4, 4), 1.0: (8, 4, 12, 8)}), 1, [(8, 4, 12, 8)]),
        (Frames(0.0, 0.5, box=(1, 2, 3, 4)), 0, [(1, 2, 3, 4)]),
        (Frames(0.0, 0.5), 0, [(0, 0, 12, 8)]),
        (Frames(0.0, 0.5), 1, []),
        (Frames(video=1), 0, []),
    ],
    ids=["tube", "frames-box", "frames", "other-time", "other-video"],
)
def test_targets_of_videos(sample, target, frame, expected):
    sample.target = target
    assert outlines(overlay(sample, values(13), video=0, frame=frame)) == expected


def test_pages_masks_and_lists(sample):
    sample.target = [Pages({1}), Box(0, 0, 1, 1, image=1), Box(0, 0, 1, 1, image=0)]
    assert outlines(overlay(sample, values(7))) == [(0, 0, 12, 8), (0, 0, 1, 1)]
    pixels = np.zeros((HEIGHT, WIDTH), dtype=bool)
    pixels[2:6, 3:9] = True
    sample.target = Mask(pixels, image=0)
    axes = overlay(sample, values(1)).axes[0]
    (line,) = [c for c in axes.collections if len(c.get_paths())]
    box = line.get_paths()[0].get_extents()
    assert (box.x0, box.x1, box.y0, box.y1) == pytest.approx((3, 9, 2, 6), abs=0.51)
    sample.target = Mask(np.ones((HEIGHT, WIDTH), dtype=bool))
    assert outlines(overlay(sample, values(1))) == [(0, 0, 12, 8)]

"""The pixels that regions touch, against a test of every single pixel."""

import math

import numpy as np
import pytest

from helpers.layout_pieces import image, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import Box, Frames, Mask, Pages, Tube
from hooked_mllm.layout.shares import pixel_masks, rectangle

ONE, CLIP = image(9, 6, 3, 2), video(9, 6, 3, 2, times=(0.0, 1.0, 2.0))


def touched(box):
    """The pixels [i, i + 1] x [j, j + 1] whose inside shares a point with the inside of the box."""
    x0, y0, x1, y1 = box
    return np.array([[x0 < x + 1 and x < x1 and y0 < y + 1 and y < y1 for x in range(9)] for y in range(6)])


@pytest.mark.parametrize("box", [(0, 0, 9, 6), (1, 2, 3, 4), (1.5, 2.5, 3.5, 4.01), (-5, 5.9, 2, 99), (8.5, 0, 8.6, 1)])
def test_a_box_touches_whole_pixels(box):
    (mask,) = pixel_masks([ONE], [Box(*box)]).values()
    np.testing.assert_array_equal(mask, touched(box))
    rows, columns = rectangle(ONE, box)
    assert mask[rows, columns].all() and mask.sum() == mask[rows, columns].size
    assert columns.stop == math.ceil(min(box[2], 9))


def test_a_union_of_boxes_masks_and_whole_images():
    pixels = np.zeros((6, 9), dtype=bool)
    pixels[5, 8] = True
    second = image(4, 4, 2, 2, index=1)
    found = pixel_masks([ONE, second], [Box(0, 0, 2, 2), Mask(pixels), Box(1, 1, 3, 3), Pages([1])])
    assert list(found) == [0, 1] and found[1].all()
    np.testing.assert_array_equal(found[0], touched((0, 0, 2, 2)) | touched((1, 1, 3, 3)) | pixels)


def test_frames_and_tubes_touch_their_frames():
    tube = Tube({0.0: (0, 0, 1, 1), 2.0: (2, 2, 3, 3)})
    found = pixel_masks([ONE, CLIP], [Frames(0.5, 1.5), tube])
    assert list(found) == [1] and found[1].shape == (3, 6, 9)
    assert found[1][1].all(), "a whole frame"
    np.testing.assert_array_equal(found[1][0], touched((0, 0, 1, 1)))
    np.testing.assert_array_equal(found[1][2], touched((2, 2, 3, 3)))
    boxed = pixel_masks([CLIP], [Frames(1.0, 2.0, box=(0, 0, 9, 1))])[0]
    assert boxed.sum((1, 2)).tolist() == [0, 9, 9]


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (Box(20, 0, 30, 5), "lies outside image 0"),
        (Box(0, 0, 1, 1, image=1), "no image 1"),
        (Mask(np.ones((9, 6), dtype=bool)), r"\[height width\] = \(6, 9\)"),
        (Frames(), "no video 0"),
    ],
)
def test_regions_that_do_not_fit(region, message):
    with pytest.raises(LayoutError, match=message):
        pixel_masks([ONE], [region])

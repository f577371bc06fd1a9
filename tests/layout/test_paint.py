"""Values of tokens painted over the picture, pixel by pixel."""

import numpy as np
import pytest
import torch

from helpers.layout_pieces import image, layout, two_views, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import Box, View


def test_painting_pixel_by_pixel():
    for item in (two_views(37, 23), image(37, 23, 5, 3), image(3, 2, 7, 5)):
        found = layout(item)
        values = torch.randn(len(found), dtype=torch.float64)
        got = found.to_image(values)
        assert got.shape == (item.height, item.width)
        for y in range(item.height):
            for x in range(item.width):
                x0, y0, x1, y1 = found.boxes.T
                here = (x0 <= x + 0.5) & (x + 0.5 < x1) & (y0 <= y + 0.5) & (y + 0.5 < y1)
                fine = here & (found.view == View.HIGHRES)
                here = fine if fine.any() else here
                assert here.sum() == 1 and got[y, x] == values[here]


def test_a_view_can_be_chosen_and_what_it_does_not_see_is_nan():
    found = layout(two_views(40, 40))
    values = torch.arange(len(found), dtype=torch.float64)
    base, fine = (found.to_image(values, view=v) for v in ("base", "highres"))
    assert sorted(set(base.ravel())) == [2, 3, 4, 5]
    assert np.isnan(fine[:, 32:]).all() and not np.isnan(fine[:, :32]).any()
    both = found.to_image(values)
    np.testing.assert_array_equal(both, np.where(np.isnan(fine), base, fine))
    with pytest.raises(LayoutError, match="no view 'tile'; it has base, highres"):
        found.to_image(values, view="tile")


def test_frames_are_painted_by_the_tokens_that_see_them():
    found = layout(video(20, 10, 2, 1, times=(0.0, 1.0, 2.0), per_step=2))
    values = np.arange(len(found))
    assert [sorted(set(found.to_image(values, video=0, frame=f).ravel())) for f in range(3)] == [[2, 3], [2, 3], [4, 5]]
    with pytest.raises(LayoutError, match="frames 0 to 2; got frame 3"):
        found.to_image(values, video=0, frame=3)


def test_region_to_tokens_to_image_covers_the_region():
    rng = np.random.default_rng(0)
    for _ in range(100):
        width, height, cols, rows = (int(v) for v in rng.integers([8, 8, 1, 1], [200, 200, 20, 20]))
        x0, y0 = int(rng.integers(width)), int(rng.integers(height))
        x1, y1 = int(rng.integers(x0, width)) + 1, int(rng.integers(y0, height)) + 1
        found = layout(image(width, height, cols, rows))
        target = found.target(Box(x0, y0, x1, y1))
        painted = found.to_image(target.double())
        assert (painted[y0:y1, x0:x1] == 1).all()  # no pixel of the region is lost
        slack_x, slack_y = width / cols + 1, height / rows + 1  # and none is painted farther off than a token is wide
        y, x = np.nonzero(painted)
        assert x.min() > x0 - slack_x and x.max() < x1 + slack_x and y.min() > y0 - slack_y and y.max() < y1 + slack_y


def test_what_to_image_rejects():
    found = layout(image(30, 20, 3, 2))
    values = torch.zeros(len(found))
    with pytest.raises(LayoutError, match=rf"shape \({len(found)},\); got \(3,\)"):
        found.to_image(values[:3])
    with pytest.raises(LayoutError, match="no image 1"):
        found.to_image(values, image=1)
    with pytest.raises(LayoutError, match="no video 0"):
        found.to_image(values, video=0)
    with pytest.raises(LayoutError, match="one image or one video"):
        found.to_image(values, image=0, video=0)
    with pytest.raises(LayoutError, match="no visual tokens"):
        layout().to_image(torch.zeros(len(layout())))

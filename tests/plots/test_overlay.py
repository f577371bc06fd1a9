""""""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pictured import HEIGHT, WIDTH, blocks, layers, outlines, values
from hooked_mllm.errors import InputError, LayoutError, NumericsError
from hooked_mllm.layout import Tube
from hooked_mllm.plots import overlay, overlay_grid


def test_each_pixel_has_its_tokens_value(sample):
    figure = overlay(sample, values(1), image=0, title="L1H2")
    picture, heat = layers(figure)
    assert blocks(heat.get_array()) == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(picture.get_array(), np.asarray(sample.images[0].convert("L")))
    axes = figure.axes[0]
    assert axes.get_xlim() == (0, WIDTH) and axes.get_ylim() == (HEIGHT, 0)  # y runs down
    assert list(heat.get_extent()) == list(picture.get_extent()) == [0, WIDTH, HEIGHT, 0]
    assert heat.get_clim() == (0, 6) and axes.get_title() == "L1H2"
    assert len(figure.axes) == 2  # the colour bar


def test_the_larger_the_more_opaque(sample):
    alpha = blocks(layers(overlay(sample, values(1), image=0, opacity=0.8))[1].get_alpha())
    assert alpha == sorted(alpha) and alpha[-1] == pytest.approx(0.8) and alpha[0] < 0.4


def test_image_of_the_target_is_the_default_and_outlined(sample):
    figure = overlay(sample, values(7))
    assert blocks(layers(figure)[1].get_array()) == [1, 2, 3, 4, 5, 6]
    assert outlines(figure) == [(4, 0, 8, 4)]
    assert outlines(overlay(sample, values(7), target=False)) == []
    assert outlines(overlay(sample, values(1), image=0)) == []  # the target is elsewhere


def test_first_image_without_a_target(sample):
    sample.target = None
    assert blocks(layers(overlay(sample, values(1)))[1].get_array()) == [1, 2, 3, 4, 5, 6]


def test_frame_of_a_video(sample):
    for frame, start in ((0, 13), (1, 19)):
        picture, heat = layers(overlay(sample, values(start), video=0, frame=frame))
        assert blocks(heat.get_array()) == [1, 2, 3, 4, 5, 6]
        expected = np.asarray(Image.fromarray(sample.videos[0].frames[frame]).convert("L"))
        np.testing.assert_array_equal(picture.get_array(), expected)


def test_video_is_the_default_when_the_target_lies_there(sample):
    sample.target = [Tube({0.0: (0, 0, 4, 4)})]
    assert blocks(layers(overlay(sample, values(13)))[1].get_array()) == [1, 2, 3, 4, 5, 6]


def test_nan_paints_nothing(sample):
    v = values(1)
    v[1] = torch.nan
    heat = layers(overlay(sample, v, image=0))[1]
    assert heat.get_array().mask[:4, :4].all() and not heat.get_array().mask[:, 4:].any()
    assert blocks(heat.get_alpha())[0] == 0


def test_grid_shares_one_scale(sample):
    figure = overlay_grid(sample, {"a": values(7), "b": 10 * values(7), "c": 0 * values(7)}, columns=2, title="top")
    *panels, _ = figure.axes
    assert [p.get_title() for p in panels] == ["a", "b", "c"]
    assert {layers(figure, i)[1].get_clim() for i in range(3)} == {(0, 60)}
    assert blocks(layers(figure, 1)[1].get_array()) == [10, 20, 30, 40, 50, 60]
    assert all(outlines(figure, i) == [(4, 0, 8, 4)] for i in range(3))
    assert figure.get_suptitle() == "top"


def test_signed_values_are_symmetric(sample):
    assert layers(overlay(sample, values(1) - 3, image=0))[1].get_clim() == (-3, 3)


def test_bfloat16_with_gradient(sample):
    row = values(1).bfloat16().requires_grad_()
    assert blocks(layers(overlay(sample, row, image=0))[1].get_array()) == [1, 2, 3, 4, 5, 6]


def test_drawing_leaves_nothing_behind(sample, tmp_path):
    overlay(sample, values(1), image=0).savefig(tmp_path / "o.png")
    assert plt.get_fignums() == []
    with Image.open(tmp_path / "o.png") as written:
        assert written.width > 100


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(5)}, LayoutError, r"\(26,\).*\(5,\)"),
        ({"image": 7}, LayoutError, "image"),
        ({"video": 0, "frame": 5}, LayoutError, "frames 0 to 1"),
        ({"values": torch.full((26,), torch.inf)}, NumericsError, "26 infinities"),
        ({"values": torch.full((26,), torch.nan)}, NumericsError, "every value is NaN"),
        ({"values": ["a"] * 26}, InputError, "array of numbers"),
        ({"opacity": 0}, InputError, "opacity"),
    ],
    ids=["length", "image", "frame", "infinite", "nan", "text", "opacity"],
)
def test_bad_input(sample, change, error, message):
    arguments = {"values": values(1), **change}
    with pytest.raises(error, match=message):
        overlay(sample, arguments.pop("values"), **arguments)


def test_bad_samples(sample):
    with pytest.raises(InputError, match="nothing to draw"):
        overlay_grid(sample, {})
    with pytest.raises(InputError, match=r"batch\[0\]"):
        overlay([sample], values(1))
    sample.images, sample.videos = (), ()
    sample.target = None
    with pytest.raises(InputError, match="no images and no videos"):
        overlay(sample, values(1))

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from hooked_mllm.errors import InputError, LayoutError, NumericsError
from hooked_mllm.layout import Box, Frames, Mask, Pages, TokenLayout, Tube, View, VisualItem
from hooked_mllm.plots import overlay, overlay_grid

WIDTH, HEIGHT, CELL = 12, 8, 4  # 2 rows of 3 tokens


def cells():
    rows = [(x, y, x + CELL, y + CELL) for y in range(0, HEIGHT, CELL) for x in range(0, WIDTH, CELL)]
    return np.array(rows, dtype=float)


def item(kind, index, frames=None):
    n = 6
    return VisualItem(
        kind,
        index,
        WIDTH,
        HEIGHT,
        np.concatenate([cells()] * (1 if frames is None else frames)),
        np.full((n, 2), -1) if frames is None else np.repeat(np.arange(frames), n)[:, None].repeat(2, 1),
        np.full(n * (frames or 1), View.WHOLE if frames is None else View.FRAME, np.int8),
        () if frames is None else tuple(float(t) for t in range(frames)),
    )


@pytest.fixture
def sample():
    """Two images and a video of two frames: 6 + 6 + 12 visual tokens after one of text, one more after them."""
    items = [item("image", 0), item("image", 1), item("video", 0, frames=2)]
    ids = torch.tensor([1] + [9] * 24 + [2])
    layout = TokenLayout.build(ids, items, (9,), {"question": [(25, 26)]})
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(2)]
    video = SimpleNamespace(frames=rng.integers(0, 255, (2, HEIGHT, WIDTH, 3), dtype=np.uint8), times_s=(0.0, 1.0))
    return SimpleNamespace(layout=layout, images=tuple(pictures), videos=(video,), target=Box(4, 0, 8, 4, image=1))


def values(start, n=26):
    """0 everywhere but 1, 2, 3, ... on the six tokens from `start`."""
    v = torch.zeros(n)
    v[start : start + 6] = torch.arange(1, 7)
    return v


def blocks(array):
    """[height width] -> the value of each 4 x 4 cell, which must be uniform."""
    array = np.asarray(array).reshape(2, CELL, 3, CELL)
    assert (array == array[:, :1, :, :1]).all()
    return array[:, 0, :, 0].ravel().tolist()


def layers(figure, panel=0):
    picture, heat = figure.axes[panel].images
    return picture, heat


def outlines(figure, panel=0):
    return [
        (p.get_x(), p.get_y(), p.get_x() + p.get_width(), p.get_y() + p.get_height())
        for p in figure.axes[panel].patches
    ]


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


def test_video_is_the_default_when_the_target_lies_there(sample):
    sample.target = [Tube({0.0: (0, 0, 4, 4)})]
    assert blocks(layers(overlay(sample, values(13)))[1].get_array()) == [1, 2, 3, 4, 5, 6]


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

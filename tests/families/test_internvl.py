"""InternVL: pixels to tokens at real sizes, against coordinate images through the model's own pixel shuffle."""

import numpy as np
import pytest

from helpers.coordinates import (
    RAW,
    centre_error,
    coordinate_image,
    coordinate_video,
    internvl_tokens,
    layout_of,
    media_of,
    metadata,
    real,
    seen,
)
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.layout import ImageMedia, VideoMedia, View

IMAGE = "<IMG_CONTEXT>"


def sizes(n: int, low: int, high: int, seed: int) -> list[tuple[int, int]]:
    return [(int(w), int(h)) for w, h in np.random.default_rng(seed).integers(low, high, (n, 2))]


def check(config, processor, width: int, height: int) -> int:
    """Centres and extents of every token of one image; the number of its tiles."""
    picture = coordinate_image(width, height)
    inputs = processor(text=IMAGE, images=[picture], **RAW)
    layout = layout_of(config, processor, inputs, media_of(picture))
    boxes, views = layout.boxes[layout.visual].numpy(), layout.view[layout.visual].numpy()
    saw = seen(internvl_tokens(inputs["pixel_values"]))
    assert centre_error(boxes, saw).max() <= 0.5, (width, height)
    step = (boxes[:, 2:] - boxes[:, :2]) / 28  # a token sees 28 x 28 pixels of its tile
    assert (np.abs(saw.low - step / 2 - boxes[:, :2]) <= 0.5 + step / 2).all(), (width, height)
    assert (np.abs(saw.high + step / 2 - boxes[:, 2:]) <= 0.5 + step / 2).all(), (width, height)
    tiles = len(inputs["pixel_values"])
    expected = [View.WHOLE] * 256 if tiles == 1 else [View.TILE] * 256 * (tiles - 1) + [View.THUMBNAIL] * 256
    assert views.tolist() == expected
    return tiles


def test_tiles_and_thumbnail_at_hundreds_of_sizes():
    # at most six tiles here, for speed; the next test goes to twelve
    config, processor = real("internvl", max_patches=6)
    counts = {check(config, processor, w, h) for w, h in [*sizes(180, 10, 500, 0), *sizes(20, 600, 1500, 1)]}
    assert counts == {1, 3, 4, 5, 6, 7}


def test_up_to_twelve_tiles():
    config, processor = real("internvl")
    shapes = [*sizes(20, 20, 900, 2), (100, 1150), (1200, 100), (448, 448), (800, 600), (1344, 1792), (2000, 1500)]
    assert max(check(config, processor, w, h) for w, h in shapes) == 13


def test_images_and_a_video_share_one_placeholder():
    config, processor = real("internvl")
    first, video, second = coordinate_image(500, 300), coordinate_video(3, 160, 90), coordinate_image(90, 90)
    inputs = processor(
        text=f"{IMAGE} one <video> two {IMAGE}",
        images=[first, second],
        videos=[video],
        video_metadata=[metadata(3)],
        **RAW,
    )
    layout = layout_of(config, processor, inputs, media_of(first, video, second))
    assert [i.name for i in layout.items] == ["image 0", "video 0", "image 1"]
    saw = seen(internvl_tokens(inputs["pixel_values"]))
    boxes = layout.boxes[layout.visual].numpy()
    assert np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - saw.mean).max() <= 0.5
    frames = layout.frame_range[layout.visual].numpy()
    moving = frames[:, 0] >= 0
    np.testing.assert_array_equal(frames[moving], np.repeat([[0, 0], [1, 1], [2, 2]], 256, axis=0))
    np.testing.assert_array_equal(saw.weight[moving].round(), frames[moving, 0] + 1)
    assert sorted(set(layout.times[layout.tokens(video=0)].tolist())) == [0.0, 0.5, 1.0]


def test_an_image_left_whole_by_the_call():
    config, processor = real("internvl")
    picture = coordinate_image(900, 300)
    inputs = processor(text=IMAGE, images=[picture], crop_to_patches=False, **RAW)
    layout = layout_of(config, processor, inputs, media_of(picture))
    assert centre_error(layout.boxes[layout.visual].numpy(), seen(internvl_tokens(inputs["pixel_values"]))).max() <= 0.5


def test_what_the_inputs_and_the_originals_disagree_on_is_named():
    config, processor = real("internvl")
    picture, video = coordinate_image(900, 300), coordinate_video(3, 160, 90)
    inputs = processor(text=IMAGE, images=[picture], **RAW)
    with pytest.raises(LayoutError, match="1 runs of placeholder tokens, but 2 images and 0 frames of 0 videos need 2"):
        layout_of(config, processor, inputs, media_of(picture, picture))
    with pytest.raises(LayoutError, match="4 tiles in the prompt, but 1 to 12 tiles make 4 x 3 and a thumbnail"):
        layout_of(config, processor, inputs, [ImageMedia(640, 480)])
    cut = dict(inputs) | {"input_ids": inputs["input_ids"][:, :-9]}
    with pytest.raises(InputError, match=r"4 tiles .* 16 x 16 tokens each, for 1016 placeholder tokens"):
        layout_of(config, processor, cut, media_of(picture))
    moving = processor(text="<video>", videos=[video], video_metadata=[metadata(3)], **RAW)
    with pytest.raises(LayoutError, match="0 images and 4 frames of 1 videos need 4"):
        layout_of(config, processor, moving, [VideoMedia(160, 90, 4, (0, 1, 2, 3))])

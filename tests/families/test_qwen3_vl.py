"""Qwen3-VL: pixels to tokens at real sizes, against coordinate images."""

import numpy as np
import pytest
import torch

from helpers.coordinates import (
    RAW,
    centre_error,
    coordinate_image,
    coordinate_video,
    layout_of,
    media_of,
    metadata,
    qwen_tokens,
    real,
    seen,
)
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import ImageMedia, VideoMedia

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_KWARGS = {"do_sample_frames": False, "cap_pixels_per_frame": False}


def sizes(n: int, low: int, high: int, seed: int) -> list[tuple[int, int]]:
    drawn = np.random.default_rng(seed).integers(low, high, (n, 2))
    return [(int(w), int(h)) for w, h in drawn if max(w, h) / min(w, h) < 190]


def test_the_centre_and_the_extent_of_every_token_at_hundreds_of_sizes():
    config, processor = real("qwen3_vl")
    for width, height in [*sizes(240, 17, 640, 0), *sizes(6, 900, 2200, 1), (3, 400), (400, 3), (1000, 33)]:
        picture = coordinate_image(width, height)
        inputs = processor(text=IMAGE, images=[picture], **RAW)
        layout = layout_of(config, processor, inputs, media_of(picture))
        boxes = layout.boxes[layout.visual].numpy()
        saw = seen(qwen_tokens(inputs["pixel_values"]))
        assert centre_error(boxes, saw).max() <= 0.5, (width, height)
        _, gh, gw = inputs["image_grid_thw"][0].tolist()
        step = np.array([width / gw, height / gh]) / 16  # original pixels to one pixel that the patch sees
        assert (np.abs(saw.low - step / 2 - boxes[:, :2]) <= 0.5 + step / 2).all(), (width, height)
        assert (np.abs(saw.high + step / 2 - boxes[:, 2:]) <= 0.5 + step / 2).all(), (width, height)


def test_several_images_of_unequal_size_keep_their_own_pixels():
    config, processor = real("qwen3_vl")
    pictures = [coordinate_image(w, h) for w, h in [(300, 500), (700, 260), (300, 500), (64, 64)]]
    inputs = processor(text="a" + "b".join([IMAGE] * 4), images=pictures, **RAW)
    layout = layout_of(config, processor, inputs, media_of(*pictures))
    saw = seen(qwen_tokens(inputs["pixel_values"]))
    assert centre_error(layout.boxes[layout.visual].numpy(), saw).max() <= 0.5
    expected = (inputs["image_grid_thw"].prod(1) // 4).tolist()
    assert [int(layout.tokens(image=i).sum()) for i in range(4)] == expected
    assert [(i.width, i.height) for i in layout.items] == [(300, 500), (700, 260), (300, 500), (64, 64)]


@pytest.mark.parametrize("n", [2, 3, 6, 7])
def test_frame_pairs_their_times_and_an_odd_last_frame(n):
    config, processor = real("qwen3_vl")
    video = coordinate_video(n, 200, 120)
    inputs = processor(text=VIDEO, videos=[video], video_metadata=[metadata(n)], **VIDEO_KWARGS, **RAW)
    layout = layout_of(config, processor, inputs, media_of(video))
    at = layout.visual
    frames = [seen(qwen_tokens(inputs["pixel_values_videos"], frame=f)) for f in (0, 1)]
    seen_frames = np.stack([f.weight for f in frames], -1).round() - 1  # blue counts from one
    np.testing.assert_array_equal(layout.frame_range[at].numpy(), seen_frames)
    boxes = layout.boxes[at].numpy()
    for f in frames:
        assert np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - f.mean).max() <= 0.5
    # the prompt writes "<0.2 seconds>" before each pair: the mean time of its frames
    stamps = processor._calculate_timestamps(list(range(n)), 2.0, 2)
    assert sorted(set(layout.times[at].tolist())) == pytest.approx(stamps)


def test_images_and_a_video_in_the_order_of_the_prompt():
    config, processor = real("qwen3_vl")
    first, video, second = coordinate_image(300, 200), coordinate_video(4, 160, 90), coordinate_image(90, 300)
    text = f"one {IMAGE} two {VIDEO} three {IMAGE}"
    inputs = processor(
        text=text, images=[first, second], videos=[video], video_metadata=[metadata(4)], **VIDEO_KWARGS, **RAW
    )
    layout = layout_of(config, processor, inputs, media_of(first, video, second))
    assert [i.name for i in layout.items] == ["image 0", "video 0", "image 1"]
    ids = inputs["input_ids"][0]
    saw = seen(qwen_tokens(inputs["pixel_values"]))
    assert centre_error(layout.boxes[ids == config.image_token_id].numpy(), saw).max() <= 0.5
    torch.testing.assert_close(layout.tokens(video=0), ids == config.video_token_id)


def test_what_the_inputs_and_the_originals_disagree_on_is_named():
    config, processor = real("qwen3_vl")
    picture, video = coordinate_image(100, 100), coordinate_video(4, 64, 64)
    inputs = processor(text=IMAGE, images=[picture], **RAW)
    with pytest.raises(LayoutError, match=r"1 images .* but 2 came"):
        layout_of(config, processor, inputs, media_of(picture, picture))
    short = dict(inputs) | {"input_ids": inputs["input_ids"][:, 3:]}
    with pytest.raises(LayoutError, match=r"image placeholder tokens, but its images give 64 tokens \(image 0: 64\)"):
        layout_of(config, processor, short, [ImageMedia(100, 100)])
    moving = processor(text=VIDEO, videos=[video], video_metadata=[metadata(4)], **VIDEO_KWARGS, **RAW)
    with pytest.raises(LayoutError, match="do_sample_frames=False"):
        layout_of(config, processor, moving, [VideoMedia(64, 64, 8, tuple(range(8)))])

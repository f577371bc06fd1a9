"""LLaVA-OneVision: pixels to tokens at real sizes, against coordinate images through the model's own packing."""

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from helpers.coordinates import (
    RAW,
    centre_error,
    coordinate_image,
    coordinate_video,
    layout_of,
    llava_tokens,
    llava_video_tokens,
    media_of,
    metadata,
    real,
    seen,
)
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import ImageMedia, VideoMedia, View


def sizes(n: int, low: int, high: int, seed: int) -> list[tuple[int, int]]:
    return [(int(w), int(h)) for w, h in np.random.default_rng(seed).integers(low, high, (n, 2))]


def one_image(config, processor, width: int, height: int):
    picture = coordinate_image(width, height)
    inputs = processor(text="<image>", images=[[picture]], **RAW)
    layout = layout_of(config, processor, inputs, media_of(picture))
    (tokens,) = llava_tokens(config, inputs)
    return layout, layout.boxes[layout.visual].numpy(), seen(tokens)


def canvas_scale(config, width: int, height: int) -> float:
    """Original pixels to one pixel of the tiled canvas."""
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    shown = get_patch_output_size(np.empty((3, height, width), np.uint8), best, "channels_first")
    return max(height / shown[0], width / shown[1])


def is_resampled(config, layout) -> bool:
    """Whether the grid was shrunk, for it had many more than nine tiles: then a cell is larger than 14 pixels."""
    wide = layout.boxes[layout.view == View.HIGHRES]
    item = layout.items[0]
    return float((wide[:, 2:] - wide[:, :2]).median()) > 14.5 * canvas_scale(config, item.width, item.height)


def check(layout, boxes, saw, tolerance: float, what) -> None:
    assert np.isnan(boxes[saw.newline]).all(), what
    assert (layout.view[layout.visual].numpy()[saw.newline] == View.NONE).all(), what
    picture = ~saw.newline
    has_box = ~np.isnan(boxes[:, 0])
    # no footprint: no picture in the patch. (At a picture's edge the resampling kernel reaches a little over it.)
    assert (np.abs(saw.weight[picture & ~has_box]) <= 0.02).all(), what
    solid = picture & has_box & (saw.weight > 0.05)
    assert centre_error(boxes[solid], seen_at(saw, solid)).max() <= tolerance, what


def seen_at(saw, at):
    return type(saw)(*(getattr(saw, f)[at] for f in ("mean", "centre", "weight", "low", "high", "newline")))


def test_base_and_high_resolution_views_at_hundreds_of_sizes():
    config, processor = real("llava_onevision")
    drawn = [*sizes(150, 20, 420, 0), *sizes(50, 400, 1000, 1), (30, 400), (400, 30), (384, 384), (768, 384), (2, 300)]
    for width, height in drawn:
        layout, boxes, saw = one_image(config, processor, width, height)
        assert not is_resampled(config, layout)
        check(layout, boxes, saw, 0.5, (width, height))
        assert int((layout.view == View.BASE).sum()) == 729


def test_the_extent_of_every_patch():
    config, processor = real("llava_onevision")
    for width, height in sizes(25, 200, 900, 2):
        layout, boxes, saw = one_image(config, processor, width, height)
        views = layout.view[layout.visual].numpy()
        scale = canvas_scale(config, width, height)
        steps = {View.BASE: np.array([width, height]) / 384, View.HIGHRES: np.array([scale, scale])}
        for view, step in steps.items():
            at = views == view
            slack = 0.5 + step / 2
            assert (np.abs(saw.low[at] - step / 2 - boxes[at, :2]) <= slack).all(), (width, height, view)
            assert (np.abs(saw.high[at] + step / 2 - boxes[at, 2:]) <= slack).all(), (width, height, view)


def test_more_than_nine_tiles_are_resampled():
    config, processor = real("llava_onevision")
    resampled = 0
    for width, height in [(2304, 2304), (2000, 1500), (1600, 2300), (2300, 900), (3100, 1200), (853, 970)]:
        layout, boxes, saw = one_image(config, processor, width, height)
        resampled += is_resampled(config, layout)
        # a cell across two tiles spans the strip of 6 pixels that no patch sees: its centre is off by half of that
        check(layout, boxes, saw, 0.5 + 3 * canvas_scale(config, width, height), (width, height))
        # away from the seams the centre is exact
        wide = (layout.view[layout.visual] == View.HIGHRES).numpy()
        errors = centre_error(boxes[wide], seen_at(saw, wide))
        assert np.mean(errors <= 0.5) > 0.75, (width, height)
    assert resampled == 5  # 853 x 970 fills just under nine tiles


def test_every_row_of_the_grid_ends_with_a_newline():
    config, processor = real("llava_onevision")
    layout, boxes, saw = one_image(config, processor, 640, 480)
    assert saw.newline.sum() > 0
    newline = np.flatnonzero(saw.newline)
    assert (np.diff(newline) == newline[0] - 729 + 1).all() and newline[-1] == len(boxes) - 1
    assert not layout.pixels[layout.visual][torch.from_numpy(saw.newline)].any()


def test_several_images_are_padded_to_squares():
    config, processor = real("llava_onevision")
    for seed in range(25):
        pictures = [coordinate_image(w, h) for w, h in sizes(3, 20, 600, 100 + seed)]
        inputs = processor(text="<image><image> and <image>", images=[pictures], **RAW)
        layout = layout_of(config, processor, inputs, media_of(*pictures))
        for i, tokens in enumerate(llava_tokens(config, inputs)):
            at = layout.tokens(image=i)
            boxes, saw = layout.boxes[at].numpy(), seen(tokens)
            assert saw.newline.tolist() == [False] * 729 + [True]
            assert np.isnan(boxes[-1]).all()
            has_box = ~np.isnan(boxes[:-1, 0])
            solid = has_box & (saw.weight[:-1] > 0.2)
            assert centre_error(boxes[:-1][solid], seen_at(saw, np.flatnonzero(solid))).max() <= 0.5, pictures[i].shape
            cell = max(pictures[i].shape) * 14 / 384
            share = (boxes[:-1, 2:] - boxes[:-1, :2]).prod(-1) / cell**2
            assert np.abs(np.nan_to_num(share) - saw.weight[:-1]).max() <= 0.05, pictures[i].shape


def test_images_given_flat_are_tiled_each():
    config, processor = real("llava_onevision")
    pictures = [coordinate_image(300, 200), coordinate_image(100, 390)]
    inputs = processor(text="<image><image>", images=pictures, **RAW)
    layout = layout_of(config, processor, inputs, media_of(*pictures))
    for i, tokens in enumerate(llava_tokens(config, inputs)):
        saw, boxes = seen(tokens), layout.boxes[layout.tokens(image=i)].numpy()
        assert centre_error(boxes[~saw.newline], seen_at(saw, ~saw.newline)).max() <= 0.5


@pytest.mark.parametrize(("n", "width", "height"), [(1, 384, 384), (3, 200, 333), (5, 500, 120)])
def test_video_frames_pooled_to_fourteen_by_fourteen(n, width, height):
    config, processor = real("llava_onevision")
    video = coordinate_video(n, width, height)
    inputs = processor(text="<video>", videos=[video], video_metadata=[metadata(n)], do_sample_frames=False, **RAW)
    layout = layout_of(config, processor, inputs, media_of(video))
    at = layout.visual
    saw = seen(llava_video_tokens(config, inputs["pixel_values_videos"][0]))
    assert int(at.sum()) == n * 196 + 1 and not layout.pixels[at][-1]
    boxes = layout.boxes[at].numpy()[:-1]
    assert np.abs((boxes[:, :2] + boxes[:, 2:]) / 2 - saw.mean).max() <= 0.5
    frames = layout.frame_range[at].numpy()[:-1]
    np.testing.assert_array_equal(frames, np.stack([saw.weight.round() - 1] * 2, -1))


def test_an_image_and_a_video():
    config, processor = real("llava_onevision")
    picture, video = coordinate_image(300, 200), coordinate_video(2, 200, 100)
    kwargs = {"video_metadata": [metadata(2)], "do_sample_frames": False}
    inputs = processor(text="<video> then <image>", images=[[picture]], videos=[video], **kwargs, **RAW)
    # whichever way round the originals were listed, the order is that of the prompt
    for media in (media_of(video, picture), media_of(picture, video)):
        layout = layout_of(config, processor, inputs, media)
        assert [i.name for i in layout.items] == ["video 0", "image 0"]
        ids = inputs["input_ids"][0]
        torch.testing.assert_close(layout.tokens(image=0), ids == config.image_token_id)
        torch.testing.assert_close(layout.tokens(video=0), ids == config.video_token_id)


def test_what_the_inputs_and_the_originals_disagree_on_is_named():
    config, processor = real("llava_onevision")
    picture, video = coordinate_image(300, 200), coordinate_video(2, 200, 100)
    inputs = processor(text="<image>", images=[[picture]], **RAW)
    with pytest.raises(LayoutError, match="Image 0 is 200 x 300, but image_sizes has 300 x 200"):
        layout_of(config, processor, inputs, [ImageMedia(200, 300)])
    kwargs = {"video_metadata": [metadata(2)], "do_sample_frames": False}
    moving = processor(text="<video>", videos=[video], **kwargs, **RAW)
    with pytest.raises(LayoutError, match=r"the 3 frames of video 0; got \(1, 2\)"):
        layout_of(config, processor, moving, [VideoMedia(200, 100, 3, (0, 1, 2))])

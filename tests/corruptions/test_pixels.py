"""The pixels of regions edited picture by picture and frame by frame."""

import numpy as np
import pytest

from helpers.edited_pictures import HEIGHT, QUESTION, REGIONS, WIDTH, arrays, masks, sample_of
from helpers.tiny import tiny_frames
from helpers.wrapped import wrapped
from hooked_mllm import Box, Frames, Tube, Video
from hooked_mllm.corruptions import MeanRegion
from hooked_mllm.corruptions.pixels import check_where, describe_where, edited
from hooked_mllm.errors import InputError


def test_frames_and_tubes_are_edited_in_their_frames(family):
    clip = Video.from_frames(tiny_frames(4, WIDTH, HEIGHT), fps=2)  # at 0, 0.5, 1 and 1.5 s
    tube = Tube({0.0: (0, 0, 10, 10), 1.0: (20, 0, 30, 10), 1.4: None})
    for target, due in (
        (Frames(0.5, 1.0), {1: np.s_[:, :], 2: np.s_[:, :]}),
        (Frames(1.5, box=(4, 5, 12, 15)), {3: np.s_[5:15, 4:12]}),
        (tube, {0: np.s_[0:10, 0:10], 1: np.s_[0:10, 10:20], 2: np.s_[0:10, 20:30]}),
    ):
        sample = wrapped(family).prepare(QUESTION, videos=[clip], target=target)
        got = MeanRegion()(wrapped(family), sample).videos[0].frames
        for f, (before, after) in enumerate(zip(clip.frames, got, strict=True)):
            mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
            if f in due:
                mask[due[f]] = True
                colour = before[~mask if not mask.all() else mask].astype(float).mean(0)
                np.testing.assert_array_equal(after[mask], np.broadcast_to(np.rint(colour), (mask.sum(), 3)))
            np.testing.assert_array_equal(after[~mask], before[~mask])


def inverted(pixels, mask):
    """Every pixel, also outside of the mask, so that a test sees which ones are taken."""
    return 255 - pixels


@pytest.mark.parametrize("name", REGIONS)
def test_only_the_pixels_of_the_region_are_taken_from_the_edit(name):
    sample = sample_of("qwen3_vl", REGIONS[name][0])
    images = [np.asarray(image) for image in edited(sample, "target", inverted)["images"]]
    for after, before, mask in zip(images, arrays(sample), masks(name), strict=True):
        np.testing.assert_array_equal(after, np.where(mask[..., None], 255 - before, before))
        assert after.dtype == np.uint8


def test_without_a_region_all_pictures_are_edited_whole():
    sample = sample_of("qwen3_vl", None)
    changed = edited(sample, None, inverted)
    assert changed["videos"] is None
    for after, before in zip(changed["images"], arrays(sample), strict=True):
        np.testing.assert_array_equal(np.asarray(after), 255 - before)


def test_new_pixels_are_rounded_and_cut_off():
    sample = sample_of("qwen3_vl", None, n=1)
    for value, expected in ((-3.0, 0), (0.6, 1), (254.4, 254), (300.0, 255)):
        image = edited(sample, None, lambda pixels, mask, v=value: np.full_like(pixels, v))["images"][0]
        assert (np.asarray(image) == expected).all()


def test_videos_keep_their_times():
    clip = Video.from_frames(tiny_frames(4, WIDTH, HEIGHT), times_s=[0, 0.5, 1.25, 2])
    sample = wrapped("qwen3_vl").prepare(QUESTION, videos=[clip])
    (video,) = edited(sample, None, inverted)["videos"]
    assert video.times_s == clip.times_s and (video.frames == 255 - clip.frames).all()


@pytest.mark.parametrize("region", [None, "target"])
def test_names_of_regions(region):
    assert check_where(region) == region == describe_where(region)


def test_regions_are_read_once():
    boxes = check_where(iter([Box(0, 0, 4, 4), Box(1, 1, 3, 3)]))
    assert boxes == [Box(0, 0, 4, 4), Box(1, 1, 3, 3)] and describe_where(boxes) == [repr(box) for box in boxes]


def test_another_name_than_target():
    with pytest.raises(InputError, match="A region is 'target', a Box, Mask, .*; got 'question'"):
        check_where("question")

"""SwapRegion: what stood in one box stands in the other, on the toy's own shapes as well."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import tiny_frames, tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import Box, Frames, HookedMLLM, Mask, Pages, Tube, Video
from hooked_mllm.corruptions import SwapRegion
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.toys import VisualRetrieval
from hooked_mllm.toys.vocabulary import COLORS

WIDTH, HEIGHT = 40, 30


def sample_of(target, n=1):
    images = [tiny_image(WIDTH, HEIGHT, seed) for seed in range(n)]
    return wrapped("qwen3_vl").prepare("What is it?", images=images, target=target, answer="red")


def swapped(sample, *args, **more):
    corrupted = SwapRegion(*args, **more)(wrapped("qwen3_vl"), sample)
    return [np.asarray(i) for i in sample.images], [np.asarray(i) for i in corrupted.images]


def test_equal_boxes_change_places_pixel_by_pixel():
    (before,), (after,) = swapped(sample_of(Box(2, 3, 12, 9)), Box(20, 20, 30, 26))
    due = before.copy()
    due[3:9, 2:12], due[20:26, 20:30] = before[20:26, 20:30], before[3:9, 2:12]
    np.testing.assert_array_equal(after, due)
    (_,), (same,) = swapped(sample_of(Box(2, 3, 12, 9)), (20, 20, 30, 26))
    np.testing.assert_array_equal(same, due)
    (_,), (same,) = swapped(sample_of([Box(2, 3, 12, 9)]), lambda s: Box(20, 20, 30, 26) if s.answer == "red" else None)
    np.testing.assert_array_equal(same, due)


def test_of_two_images():
    before, after = swapped(sample_of(Box(2, 3, 12, 9, image=1), n=2), Box(4, 4, 14, 10))
    due = [b.copy() for b in before]
    due[1][3:9, 2:12], due[0][4:10, 4:14] = before[0][4:10, 4:14], before[1][3:9, 2:12]
    for picture, expected in zip(after, due, strict=True):
        np.testing.assert_array_equal(picture, expected)


def test_unequal_boxes_are_resized_into_one_another():
    (before,), (after,) = swapped(sample_of(Box(2, 3, 12, 9)), Box(20, 10, 40, 30))
    due = before.copy()
    small, large = Image.fromarray(before[3:9, 2:12]), Image.fromarray(before[10:30, 20:40])
    due[3:9, 2:12] = np.asarray(large.resize((10, 6), Image.Resampling.BICUBIC))
    due[10:30, 20:40] = np.asarray(small.resize((20, 20), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(after, due)


def test_a_drawn_box_is_clear_of_the_target_and_depends_on_seed_and_sample():
    sample, places = sample_of(Box(4, 2, 16, 12)), set()
    for seed in range(12):
        (before,), (after,) = swapped(sample, seed=seed)
        np.testing.assert_array_equal(after, swapped(sample, seed=seed)[1][0])
        changed = (before != after).any(-1)
        assert changed[2:12, 4:16].mean() > 0.9
        changed[2:12, 4:16] = False
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        y, x = rows[0], columns[0]
        assert rows[-1] - y == 9 and columns[-1] - x == 11
        np.testing.assert_array_equal(after[y : y + 10, x : x + 12], before[2:12, 4:16])
        places.add((int(y), int(x)))
    assert len(places) > 6
    with pytest.raises(LayoutError, match=r"image 0 of 40 x 30 pixels has no room for a second box of 30 x 20 clear"):
        swapped(sample_of(Box(5, 5, 35, 25)))


def test_in_a_video_the_boxes_change_places_in_the_target_s_frames(family):
    clip = Video.from_frames(tiny_frames(4, WIDTH, HEIGHT), fps=2)
    target = Frames(0.4, 1.1, box=(2, 3, 12, 9))
    sample = wrapped(family).prepare("What is it?", videos=[clip], target=target)
    for box in (Box(20, 20, 30, 26), None):
        got = SwapRegion(box)(wrapped(family), sample).videos[0].frames
        np.testing.assert_array_equal(got[[0, 3]], clip.frames[[0, 3]])
        if box is not None:
            due = clip.frames[1:3].copy()
            due[:, 3:9, 2:12] = clip.frames[1:3, 20:26, 20:30]
            due[:, 20:26, 20:30] = clip.frames[1:3, 3:9, 2:12]
            np.testing.assert_array_equal(got[1:3], due)
        assert (got[1:3] != clip.frames[1:3]).any(-1).sum() > 200


def test_what_cannot_change_places_is_rejected():
    clip = Video.from_frames(tiny_frames(4, WIDTH, HEIGHT), fps=2)
    model = wrapped("qwen3_vl")
    for target in (Mask(np.eye(HEIGHT, WIDTH, dtype=bool)), Pages({0}), [Box(0, 0, 4, 4), Box(9, 9, 12, 12)]):
        with pytest.raises(LayoutError, match="exchanges two boxes.*BlurRegion and MeanRegion take"):
            swapped(sample_of(target), Box(20, 20, 30, 26))
    for target in (Frames(0, 1), Tube({0.0: (0, 0, 4, 4), 1.0: (9, 9, 12, 12)})):
        with pytest.raises(LayoutError, match=r"it needs one Box, or Frames\(\.\.\., box=\.\.\.\) in a video"):
            SwapRegion(Box(20, 20, 30, 26))(model, model.prepare("What?", videos=[clip], target=target))
    with pytest.raises(LayoutError, match="overlap in image 0.*rows 3:9 and columns 2:12 against rows 8:14"):
        swapped(sample_of(Box(2, 3, 12, 9)), Box(11, 8, 21, 14))
    with pytest.raises(LayoutError, match="lies outside image 0"):
        swapped(sample_of(Box(2, 3, 12, 9)), Box(80, 80, 90, 86))
    with pytest.raises(LayoutError, match="no image 3"):
        swapped(sample_of(Box(2, 3, 12, 9)), Box(0, 0, 10, 6, image=3))
    with pytest.raises(InputError, match="no target"):
        swapped(sample_of(None), Box(0, 0, 10, 6))
    with pytest.raises(LayoutError, match="x0 < x1"):
        SwapRegion((9, 9, 2, 2))


@torch.no_grad()
@pytest.mark.parametrize("toy", ["toy-qwen3-vl", "toy-llava-onevision", "toy-internvl"])
def test_toys_still_find_the_shape_in_its_new_place(toy):
    model = HookedMLLM.from_pretrained(toy, dtype="float32", check=False)
    task = VisualRetrieval(seed=9, pages=1, filler=4)
    ids, right = [model.processor.tokenizer.get_vocab()[c] for c in COLORS], 0
    for sample in task.samples(model, 8, answer=True):
        x, y = int(sample.target.x0), int(sample.target.y0)
        corrupted = SwapRegion(Box((x + 48) % 96, y, (x + 48) % 96 + 16, y + 16))(model, sample)
        predicted = model(corrupted)[0, sample.layout.last_index, ids].argmax()
        right += list(COLORS)[predicted] == sample.answer
    assert right >= 6

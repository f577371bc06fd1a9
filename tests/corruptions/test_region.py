"""Regions edited in the original pixels: compared pixel by pixel with NumPy, and everything outside bit for bit."""

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_frames, tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import Box, Frames, Mask, Pages, Tube, Video
from hooked_mllm.corruptions import BlurRegion, ImageNoise, MeanRegion
from hooked_mllm.errors import InputError, LayoutError

WIDTH, HEIGHT = 40, 30
QUESTION = "What colour is the mug?"


def sample_of(family, target, n=2, **more):
    images = [tiny_image(WIDTH, HEIGHT, seed) for seed in range(n)]
    return wrapped(family).prepare(QUESTION, images=images, target=target, answer="red", id="s", **more)


def arrays(sample):
    return [np.asarray(i).astype(float) for i in sample.images]


def disc():
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (x - 20) ** 2 + (y - 12) ** 2 < 60


def blurred(picture, sigma):
    """A Gaussian by explicit sums, edges repeated."""
    reach = int(4 * sigma + 0.5)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        wide = np.pad(picture, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        length = picture.shape[axis]
        picture = sum(k * np.take(wide, np.arange(i, i + length), axis) for i, k in enumerate(kernel))
    return picture


#: target, and where it is on each of two images
REGIONS = {
    "box": (Box(5.3, 4, 17.9, 20), lambda m: m[0].__setitem__(np.s_[4:20, 5:18], True)),
    "cut off": (Box(30, -5, 99, 7.2, image=1), lambda m: m[1].__setitem__(np.s_[0:8, 30:], True)),
    "mask": (Mask(disc(), image=1), lambda m: m[1].__setitem__(disc(), True)),
    "page": (Pages({1}), lambda m: m[1].__setitem__(np.s_[:], True)),
    "several": (
        [Box(0, 0, 4, 4), Box(2, 2, 9, 9), Box(1, 1, 3, 3, image=1)],
        lambda m: (
            m[0].__setitem__(np.s_[0:4, 0:4], True),
            m[0].__setitem__(np.s_[2:9, 2:9], True),
            m[1].__setitem__(np.s_[1:3, 1:3], True),
        ),
    ),
}


def masks(name):
    found = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    REGIONS[name][1](found)
    return found


@pytest.mark.parametrize("name", REGIONS)
def test_blur_is_a_gaussian_inside_and_nothing_outside(name):
    sample = sample_of("qwen3_vl", REGIONS[name][0])
    got = arrays(BlurRegion(2.5)(wrapped("qwen3_vl"), sample))
    for picture, before, mask in zip(got, arrays(sample), masks(name), strict=True):
        np.testing.assert_array_equal(picture[~mask], before[~mask])
        np.testing.assert_allclose(picture[mask], blurred(before, 2.5)[mask], atol=0.501)


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("of", ["rest", "region"])
def test_mean_is_one_colour_inside_and_nothing_outside(name, of):
    sample = sample_of("qwen3_vl", REGIONS[name][0])
    got = arrays(MeanRegion(of=of)(wrapped("qwen3_vl"), sample))
    for picture, before, mask in zip(got, arrays(sample), masks(name), strict=True):
        np.testing.assert_array_equal(picture[~mask], before[~mask])
        if mask.any():
            source = before[~mask] if of == "rest" and not mask.all() else before[mask]
            np.testing.assert_array_equal(picture[mask], np.broadcast_to(np.rint(source.mean(0)), picture[mask].shape))


def test_noise_is_normal_cut_off_and_drawn_by_seed_and_sample():
    model, sample = wrapped("qwen3_vl"), sample_of("qwen3_vl", Box(5, 4, 18, 20))
    first = arrays(ImageNoise(20, seed=1)(model, sample))
    again = arrays(ImageNoise(20, seed=1)(model, sample))
    other = arrays(ImageNoise(20, seed=2)(model, sample))
    elsewhere = model.prepare("What else?", images=list(sample.images))
    np.testing.assert_array_equal(first, again)
    assert (np.array(first) != other).mean() > 0.5
    assert (np.array(first) != arrays(ImageNoise(20, seed=1)(model, elsewhere))).mean() > 0.5
    middle = (np.array(arrays(sample)) > 90) & (np.array(arrays(sample)) < 165)  # far from where it is cut off
    added = (np.array(first) - arrays(sample))[middle]
    assert abs(added.mean()) < 1.5 and abs(added.std() - 20) < 1.5
    assert np.array(first).min() >= 0 and np.array(first).max() <= 255
    inside = arrays(ImageNoise(20, region="target")(model, sample))
    np.testing.assert_array_equal(inside[1], arrays(sample)[1])
    changed = (inside[0] != arrays(sample)[0]).any(-1)
    assert changed[4:20, 5:18].mean() > 0.95 and changed.sum() == changed[4:20, 5:18].sum()


def test_the_counterpart_is_what_the_processor_makes_of_the_edited_picture(family):
    model = wrapped(family)
    sample = sample_of(family, Box(5, 4, 30, 20), n=1, system="Be brief.")
    for corruption in (BlurRegion(3), MeanRegion(), ImageNoise(40), MeanRegion(region=Box(0, 0, 9, 9))):
        corrupted = corruption(model, sample)
        by_hand = model.processor(
            text=[rendered(model, "Be brief.")], images=[list(corrupted.images)], return_tensors="pt"
        )
        assert torch.equal(corrupted.inputs["pixel_values"], by_hand["pixel_values"])
        assert not torch.equal(corrupted.inputs["pixel_values"], sample.inputs["pixel_values"])
        n = by_hand["input_ids"].shape[1]
        assert torch.equal(corrupted.inputs["input_ids"][:, :n], by_hand["input_ids"])
        assert torch.equal(corrupted.inputs["input_ids"], sample.inputs["input_ids"])  # the answer's tokens with them
        assert torch.equal(corrupted.target_mask, sample.target_mask)
        assert (corrupted.answer, corrupted.target, corrupted.id) == ("red", sample.target, "s")


def rendered(model, system):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    ]
    return model.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


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


def test_settings_and_regions_that_do_not_fit_are_refused():
    model, sample = wrapped("qwen3_vl"), sample_of("qwen3_vl", None)
    for make, why in (
        (lambda: BlurRegion(0), "sigma is a positive number of pixels; got 0"),
        (lambda: BlurRegion(float("nan")), "sigma is a positive"),
        (lambda: ImageNoise(-1), "std is a positive number of pixel values"),
        (lambda: ImageNoise(3, seed=-1), "seed is an integer from 0; got -1"),
        (lambda: ImageNoise(3, seed=True), "seed is an integer"),
        (lambda: MeanRegion(of="picture"), "of is 'rest' or 'region'"),
        (lambda: MeanRegion("question"), "A region is 'target', a Box.*got 'question'"),
    ):
        with pytest.raises(InputError, match=why):
            make()
    for corruption in (BlurRegion(2), MeanRegion(), ImageNoise(9, region="target")):
        with pytest.raises(InputError, match="has no target region: give `target=` to prepare"):
            corruption(model, sample)
        with pytest.raises(InputError, match="no images and no videos, so there are no pixels"):
            corruption(model, model.prepare(QUESTION))
    for region, why in (
        (Box(0, 0, 9, 9, image=2), "There is no image 2: this input has 2"),
        (Box(99, 99, 120, 120), "lies outside image 0, which is 40 x 30"),
        (Mask(np.ones((4, 4), dtype=bool)), r"shape \[height width\] = \(30, 40\); got \(4, 4\)"),
        (Frames(0, 1), "There is no video 0: this input has none"),
    ):
        with pytest.raises(LayoutError, match=why):
            MeanRegion(region)(model, sample)
    flat = model.prepare(QUESTION, images=np.zeros((HEIGHT, WIDTH, 3), np.uint8), target=Box(0, 0, 9, 9))
    with pytest.raises(InputError, match=r"MeanRegion\(region='target', of='rest'\) changes nothing"):
        MeanRegion()(model, flat)

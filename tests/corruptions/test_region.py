"""Regions edited in the original pixels: compared pixel by pixel with NumPy, and everything outside bit for bit."""

import numpy as np
import pytest
import torch

from helpers.edited_pictures import HEIGHT, QUESTION, REGIONS, WIDTH, arrays, masks, sample_of
from helpers.wrapped import wrapped
from hooked_mllm import Box, Frames, Mask
from hooked_mllm.corruptions import BlurRegion, ImageNoise, MeanRegion
from hooked_mllm.errors import InputError, LayoutError


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


def test_settings_and_regions_that_do_not_fit_are_rejected():
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

"""Noise on pixels: its moments, its seed, and where it is."""

import numpy as np
import pytest

from helpers.edited_pictures import arrays, sample_of
from helpers.wrapped import wrapped
from hooked_mllm import Box
from hooked_mllm.corruptions import ImageNoise
from hooked_mllm.errors import InputError


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


@pytest.mark.parametrize("std", [0, -3, float("nan"), float("inf")])
def test_a_standard_deviation_that_is_none(std):
    with pytest.raises(InputError, match="std is a positive number of pixel values"):
        ImageNoise(std)


def test_settings_are_described():
    noise = ImageNoise(20, region=[Box(0, 0, 4, 4)], seed=3)
    assert noise.describe() == {
        "corruption": "ImageNoise",
        "std": 20.0,
        "region": ["Box(x0=0, y0=0, x1=4, y1=4, image=0)"],
        "seed": 3,
    }
    assert repr(ImageNoise(20)) == "ImageNoise(std=20.0, seed=0)"

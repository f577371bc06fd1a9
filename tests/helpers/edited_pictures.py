"""Samples of two pictures, and the pixels of a region marked by hand."""

import numpy as np

from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import Box, Mask, Pages

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

import io
from base64 import b64decode

import numpy as np
from PIL import Image

from helpers.html import Page
from hooked_mllm.display.images import html_image, html_thumbnails


def sources(html):
    return [value for _, name, value in Page(html).attributes if name == "src"]


def test_an_image_is_part_of_the_page():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (source,) = sources(html_image(Image.fromarray(pixels), 'a "b" <c>'))
    with Image.open(io.BytesIO(b64decode(source.removeprefix("data:image/png;base64,")))) as image:
        assert np.array_equal(np.asarray(image), pixels)
    attributes = Page(html_image(Image.fromarray(pixels), 'a "b" <c>', "width:4px")).attributes
    assert ("img", "alt", 'a "b" <c>') in attributes and ("img", "style", "width:4px") in attributes


def test_thumbnails_are_small_and_few():
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 300, 3), dtype=np.uint8))
    html = html_thumbnails([(f"image {i}", large) for i in range(9)], most_bytes=40_000)
    assert len(sources(html)) == 4 and len(html) <= 40_000
    with Image.open(io.BytesIO(b64decode(sources(html)[0].partition(",")[2]))) as image:
        assert image.size == (56, 112)
    assert large.size == (300, 600)  # the original is not changed
    assert len(sources(html_thumbnails([("noise", large)] * 4, most_bytes=len(html) * 3 // 4))) == 3
    assert html_thumbnails([]) == ""

"""Pictures come in many forms; the model must see what a person sees."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.tiny import tiny_image
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.images import load_image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def corner_red(width=6, height=4) -> Image.Image:
    image = Image.new("RGB", (width, height), GREEN)
    image.putpixel((0, 0), RED)
    return image


@pytest.mark.parametrize("form", ["hwc", "chw", "float hwc", "tensor chw", "tensor bf16", "int64", "pil"])
def test_every_form_of_one_picture_is_the_same_picture(form):
    image = corner_red()
    hwc = np.asarray(image)
    forms = {
        "hwc": hwc,
        "chw": hwc.transpose(2, 0, 1),
        "float hwc": hwc / 255,
        "tensor chw": torch.from_numpy(hwc.copy()).permute(2, 0, 1),
        "tensor bf16": torch.from_numpy(hwc / 255).to(torch.bfloat16),
        "int64": hwc.astype(np.int64),
        "pil": image,
    }
    assert np.array_equal(np.asarray(load_image(forms[form])), hwc)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_floats_round_to_the_level_they_came_from(seed):
    hwc = np.asarray(tiny_image(seed=seed))
    assert np.array_equal(np.asarray(load_image((hwc / 255).astype(np.float32))), hwc)


def test_exif_orientation_is_applied(tmp_path):
    image = corner_red()
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned a quarter clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (4, 6)
    assert upright.getpixel((3, 0)) == RED


def test_transparent_pixels_show_white_whatever_lies_under_them():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert [load_image(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), RED]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert load_image(grey).getpixel((0, 0)) == (255, 255, 255)


def test_palettes_with_and_without_transparency(tmp_path):
    image = corner_red().quantize(4)
    assert load_image(image).getpixel((0, 0)) == RED
    index = image.getpixel((0, 0))
    image.save(tmp_path / "clear.png", transparency=index)
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "clear.png").getpixel((1, 0)) == GREEN


def test_sixteen_bit_greys_keep_their_contrast():
    ramp = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    assert [load_image(Image.fromarray(ramp)).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (3, 2), "white").convert(mode)
    assert load_image(image).mode == "RGB"
    assert np.asarray(load_image(image)).min() == 255


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["numpy", "torch", "pil"])
def test_nan_in_pixels_is_refused(value, kind):
    pixels = np.full((4, 6), 0.5, dtype=np.float32)
    pixels[1, 2] = value
    given = {"numpy": np.stack([pixels] * 3), "torch": torch.from_numpy(pixels), "pil": Image.fromarray(pixels)}[kind]
    with pytest.raises(InputError, match=r"NaN or infinity in [13] of its"):
        load_image(given)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.full((4, 6, 3), 2.0), "0 to 1; got values from 2 to 2"),
        (np.full((4, 6, 3), -1), "0 to 255; got values from -1"),
        (np.zeros((5, 6, 7), np.uint8), "1, 3 or 4 channels"),
        (np.zeros((0, 6, 3), np.uint8), "shape"),
        (np.zeros((1, 4, 6, 3), np.uint8), "shape"),
        (np.array([["a"]]), "numbers for pixels"),
        (3, "PIL image, a path, or an array; got int"),
        (b"png", "PIL image, a path, or an array; got bytes"),
        ("no/such.png", "No image file at"),
        ("https://somewhere/a.png", "not from addresses"),
    ],
)
def test_what_is_no_picture_is_refused(bad, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(load_image)(bad)


def test_a_truncated_file_and_a_text_are_refused(tmp_path):
    tiny_image(64, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("half.png", "text.png"):
        with pytest.raises(InputError, match="cannot be read as an image"):
            load_image(tmp_path / name)

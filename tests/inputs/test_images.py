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


@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_turned_once_for_paths_pil_images_and_arrays(kind, orientation, tmp_path):
    image = Image.new("RGB", (32, 16), GREEN)
    image.paste(RED, (0, 0, 16, 8))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{kind}", exif=exif)
    # EXIF 2.3: the sides of the picture at which row 0 and column 0 of the file are shown
    stored = np.asarray(image)
    transposed = stored.swapaxes(0, 1)
    shown = [
        stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1],
        transposed, transposed[:, ::-1], transposed[::-1, ::-1], transposed[::-1],
    ][orientation - 1]  # fmt: skip
    with Image.open(tmp_path / f"a.{kind}") as opened:
        once = load_image(opened)
    for upright in (load_image(tmp_path / f"a.{kind}"), once, load_image(once), load_image(shown)):
        assert upright.size == shown.shape[1::-1]
        assert np.median(np.abs(np.asarray(upright).astype(int) - shown)) < 10  # JPEG blurs the edge


def test_transparent_pixels_are_white_for_every_hidden_colour():
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


@pytest.mark.parametrize("form", ["I;16", "I", "array", "tensor", "path"])
@pytest.mark.parametrize("level", [0, 1, 100, 255, 256, 257, 4095, 30000, 65535])
def test_sixteen_bit_greys_do_not_depend_on_the_brightest_pixel(form, level, tmp_path):
    def loaded(pixels: np.ndarray) -> int:
        Image.fromarray(pixels).save(tmp_path / "a.png")
        picture = {
            "I;16": Image.fromarray(pixels),
            "I": Image.fromarray(pixels.astype(np.int32)),
            "array": pixels,
            "tensor": torch.from_numpy(pixels),
            "path": tmp_path / "a.png",
        }[form]
        return load_image(picture).getpixel((0, 0))[0]

    plain, bright = (np.array([[level, other]], dtype=np.uint16) for other in (level, 65535))
    assert loaded(plain) == loaded(bright) == level * 255 // 65535


def test_greys_outside_of_their_range_are_rejected():
    for values in ([[0, 65536]], [[-1, 5]]):
        with pytest.raises(InputError, match="16 bits, 0 to 65535; got values from"):
            load_image(Image.fromarray(np.array(values, dtype=np.int32)))
    for dark in (0.5, 1.0):
        assert load_image(Image.fromarray(np.full((1, 1), dark, np.float32))).getpixel((0, 0))[0] == round(255 * dark)
    with pytest.raises(InputError, match="0 to 1; got values from 2 to 2"):
        load_image(Image.fromarray(np.full((1, 1), 2.0, np.float32)))


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (3, 2), "white").convert(mode)
    assert load_image(image).mode == "RGB"
    assert np.asarray(load_image(image)).min() == 255


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["numpy", "torch", "pil"])
def test_nan_in_pixels_is_rejected(value, kind):
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
def test_what_is_no_picture_is_rejected(bad, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(load_image)(bad)


def test_a_truncated_file_and_a_text_are_rejected(tmp_path):
    tiny_image(64, 64).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    for name in ("half.png", "text.png"):
        with pytest.raises(InputError, match="cannot be read as an image"):
            load_image(tmp_path / name)

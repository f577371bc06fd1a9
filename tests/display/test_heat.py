import io
import re
from base64 import b64decode

import numpy as np
import pytest
from PIL import Image

from helpers.html import Page
from hooked_mllm.display.heat import html_heat

LIGHT, DARK = ((255, 255, 255), (0x1F, 0x23, 0x28)), ((0x0D, 0x11, 0x17), (0xE6, 0xED, 0xF3))  # (paper, ink)


def names(letter, n):
    return [f"{letter}{i}" for i in range(n)]


def luminance(color):
    """Relative luminance of sRGB, as WCAG 2 defines it."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colors_of_a_small_table():
    values = np.array([[0.0, 0.5, 1.0], [-1.0, -0.004, np.nan]])
    page = Page(html_heat(values, ["L0", "L1"], names("H", 3)))
    assert page.texts == ["H0", "H1", "H2", "L0", "0.00", "0.50", "1.00", "L1", "-1.00", "0.00", "–"]
    colors = [re.fullmatch(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", style).groups() for style in page.style]
    assert [float(opacity) for *_, opacity in colors] == [0.0, 0.3, 0.6, 0.6, 0.0]  # NaN has none
    blue, red = colors[2][:3], colors[3][:3]
    assert int(blue[2]) > int(blue[0]) and int(red[0]) > int(red[2])


@pytest.mark.parametrize(("paper", "ink"), [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_numbers_are_readable_on_the_strongest_color_of_either_theme(paper, ink, value):
    """The contrast that WCAG 2 AA requires of text."""
    style = Page(html_heat(np.array([[value]]), ["L0"], ["H0"])).style[0]
    *color, opacity = map(float, re.search(r"rgba\((.*)\)", style)[1].split(","))
    shade = [opacity * c + (1 - opacity) * p for c, p in zip(color, paper, strict=True)]
    low, high = sorted((luminance(shade), luminance(ink)))
    assert (high + 0.05) / (low + 0.05) > 4.5


@pytest.mark.parametrize(
    ("largest", "text"),
    [(0.991, "0.99"), (2.2, "2.20"), (31.44, "31.4"), (1234.5, "1234"), (0.00123, "0.0012"), (1e-9, "1.0e-09")],
)
def test_numbers_have_the_decimals_of_the_largest(largest, text):
    assert Page(html_heat(np.array([[largest, 0.0]]), ["r"], ["a", "b"])).texts[3] == text


def picture(html):
    source = next(value for tag, name, value in Page(html).attributes if (tag, name) == ("img", "src"))
    with Image.open(io.BytesIO(b64decode(source.removeprefix("data:image/png;base64,")))) as image:
        return np.asarray(image.convert("RGBA"))


def test_large_values_are_a_picture_of_one_pixel_each():
    values = np.zeros((36, 32))
    values[3, 5], values[7, 9], values[0, 0] = 2.0, -1.0, np.nan
    html = html_heat(values, names("L", 36), names("H", 32))
    pixels = picture(html)
    assert pixels.shape == (36, 32, 4) and "<td" not in html
    assert pixels[3, 5, 3] == 255 and pixels[7, 9, 3] == 136 and pixels[..., 3].sum() == 255 + 136
    assert pixels[3, 5, 2] > pixels[3, 5, 0] and pixels[7, 9, 0] > pixels[7, 9, 2]
    assert Page(html).texts == ["36 rows, L0 (top) to L35; 32 columns, H0 (left) to H31"]


def test_of_many_columns_the_largest_of_neighbors_is_drawn():
    values = np.full((2, 1000), 0.1)
    values[1, 617] = -1.0
    pixels = picture(html_heat(values, ["a", "b"], range(1000)))
    assert pixels.shape == (2, 256, 4)
    strongest = np.argwhere(pixels[..., 3] == 255)
    assert len(strongest) == 1 and strongest[0, 0] == 1 and strongest[0, 1] == pytest.approx(617 * 256 / 1000, abs=1)


def test_names_are_escaped_and_nothing_is_drawn_of_nothing():
    page = Page(html_heat(np.array([[1.0]]), ["<b>"], ["<script>"]))
    assert page.texts[:2] == ["<script>", "<b>"] and "script" not in page.tags
    wide = html_heat(np.ones((2, 300)), ["<b>", "c"], [f"<script>{i}" for i in range(300)])
    assert "script" not in Page(wide).tags
    assert html_heat(np.empty((0, 4)), [], names("H", 4)) == "" and "0.00" in html_heat(np.zeros((1, 1)), ["a"], ["b"])

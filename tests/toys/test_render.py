"""Shapes on grey noise, pixel by pixel: where they are, how large, and that everything else is noise."""

import numpy as np
import pytest

from hooked_mllm.toys.render import (
    BACKGROUND,
    CELL,
    COLOR_JITTER,
    FRAMES,
    GRID,
    NOISE,
    PAGE,
    VARIANTS,
    VIDEO_CELL,
    VIDEO_GRID,
    draw,
    draw_moments,
    sprites,
)
from hooked_mllm.toys.vocabulary import COLORS, SHAPES


def test_sprites_cover_a_share_of_each_pixel():
    bank = sprites()
    assert bank.shape == (len(SHAPES), VARIANTS, CELL, CELL) and bank.min() == 0.0 and bank.max() == 1.0
    assert (bank.sum((2, 3)) > 30).all(), "every variant is large enough to be seen"
    larger = sprites(2)
    smaller = larger.reshape(len(SHAPES), VARIANTS, CELL, 2, CELL, 2).mean((3, 5))
    np.testing.assert_allclose(smaller, bank, atol=0.3)  # of more subpixels


def test_a_circle_is_one():
    """The area of each size of a circle is pi r^2 on subpixels."""
    areas = sorted({round(float(area)) for area in sprites()[SHAPES.index("circle")].sum((1, 2))})
    for radius in (5.5, 6.25, 7.0):
        assert any(abs(area - np.pi * radius**2) < 3 for area in areas)


@pytest.mark.parametrize("pages", [1, 3])
def test_objects_are_in_their_cells_and_the_rest_is_noise(pages):
    numbers = np.array([0, 7, pages * GRID * GRID - 1])
    pictures = draw(np.random.default_rng(0), pages, np.array([1, 2, 3]), np.array([0, 1, 2]), numbers)
    assert pictures.shape == (pages, PAGE, PAGE, 3) and pictures.dtype == np.uint8
    cells = pictures.reshape(pages, GRID, CELL, GRID, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    cells = cells.reshape(pages * GRID * GRID, CELL, CELL, 3).astype(int)
    drawn = np.flatnonzero(np.abs(cells - BACKGROUND).max((1, 2, 3)) > NOISE)
    assert drawn.tolist() == numbers.tolist()


def test_the_colour_of_an_object_is_its_shade_plus_noise():
    picture = draw(np.random.default_rng(0), 1, np.array([SHAPES.index("square")]), np.array([2]), np.array([0]))[0]
    inside = picture[6:10, 6:10].astype(int)  # every size and shift of a square covers the middle
    shade = np.array(list(COLORS.values())[2])
    assert (np.abs(inside - shade) <= COLOR_JITTER + NOISE).all()
    assert np.ptp(inside, axis=(0, 1)).max() <= 2 * NOISE, "one shade, and noise"


def test_frames_of_a_moment_differ_in_noise_alone():
    frames = draw_moments(np.random.default_rng(0), 2, np.array([4, 5]), np.array([0, 3]), np.array([0, 13]))
    assert frames.shape == (2 * FRAMES, PAGE, PAGE, 3) and PAGE == VIDEO_GRID * VIDEO_CELL
    frames = frames.astype(int)
    for moment in range(2):
        first, second = frames[2 * moment], frames[2 * moment + 1]
        assert (first != second).mean() > 0.5 and np.abs(first - second).max() <= 2 * NOISE
    drawn = [np.abs(frame - BACKGROUND).max(-1) > NOISE for frame in frames]
    assert drawn[0][:VIDEO_CELL, :VIDEO_CELL].any() and not drawn[0][VIDEO_CELL:].any()
    assert drawn[2][VIDEO_CELL : 2 * VIDEO_CELL, VIDEO_CELL : 2 * VIDEO_CELL].any()  # cell 13 is the middle of moment 1


def test_drawing_depends_on_the_generator_alone():
    arguments = (1, np.array([6]), np.array([0]), np.array([35]))
    first, again, other = (draw(np.random.default_rng(seed), *arguments) for seed in (0, 0, 1))
    assert (first == again).all() and not (first == other).all()

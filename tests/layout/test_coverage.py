"""The area of a union inside rectangles, against a count of small squares."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hooked_mllm.layout.coverage import Coverage

SIZE, FINE = 8, 4  # pixels of the picture, and squares to a pixel, each way
quarters = st.integers(0, SIZE * FINE).map(lambda v: v / FINE)


@st.composite
def rectangles(draw):
    xs, ys = (sorted(draw(st.lists(quarters, min_size=2, max_size=2, unique=True))) for _ in range(2))
    return xs[0], ys[0], xs[1], ys[1]


def squares(box):
    """Which small squares lie in a rectangle, [row col]."""
    inside = np.zeros((SIZE * FINE, SIZE * FINE), dtype=bool)
    x0, y0, x1, y1 = (round(v * FINE) for v in box)
    inside[y0:y1, x0:x1] = True
    return inside


@settings(deadline=None)
@given(
    st.lists(rectangles(), max_size=4),
    st.integers(0, 10**6) | st.none(),
    st.lists(rectangles(), min_size=1, max_size=4),
)
def test_the_area_is_that_of_counted_squares(boxes, mask_seed, footprints):
    masks = []
    if mask_seed is not None:
        masks = [np.random.default_rng(mask_seed).random((SIZE, SIZE)) < 0.4]
        masks[0][0, 0] = True
    if not boxes and not masks:
        return
    union = np.zeros((SIZE * FINE, SIZE * FINE), dtype=bool)
    for box in boxes:
        union |= squares(box)
    for mask in masks:
        union |= mask.repeat(FINE, 0).repeat(FINE, 1)
    counted = [(union & squares(box)).sum() / FINE**2 for box in footprints]
    np.testing.assert_allclose(Coverage(boxes, masks).area(np.array(footprints)), counted, atol=1e-9)


def test_rectangles_without_pixels_have_no_area():
    area = Coverage([(0.0, 0.0, 4.0, 4.0)]).area(np.array([[1.0, 1, 2, 2], [np.nan] * 4]))
    assert area[0] == 1 and np.isnan(area[1])


def test_areas_are_exact_between_the_edges():
    """A rectangle that ends inside a cell, where the integral is interpolated."""
    area = Coverage([(0.0, 0.0, 1.0, 1.0)]).area(np.array([[0.25, 0.1, 0.5, 0.7], [-3.0, -3, 0.5, 9]]))
    np.testing.assert_allclose(area, [0.25 * 0.6, 0.5])

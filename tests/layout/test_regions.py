"""Regions that make no sense are errors when they are made."""

import numpy as np
import pytest

from helpers.layout_pieces import image, layout, video
from hooked_mllm.errors import LayoutError
from hooked_mllm.layout import Box, Frames, Mask, Pages, Tube
from hooked_mllm.layout.regions import corners, moved


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box(5, 0, 5, 9), "x0 < x1"),
        (lambda: Box(0, 9, 5, 3), "x, y, width, height"),
        (lambda: Box(0, 0, float("nan"), 3), "finite"),
        (lambda: Frames(3.0, 2.0), "start_s <= end_s"),
        (lambda: Frames(box=(1, 2, 3)), "got 3 numbers"),
        (lambda: Tube({}), "a box at one time or more"),
        (lambda: Tube({0.0: None}), "a box at one time or more"),
        (lambda: Tube({1.0: (0, 0, 0, 5)}), "at 1.0 s"),
        (lambda: Pages([]), "at least one image"),
        (lambda: Mask(np.zeros((3, 3), bool)), "empty"),
        (lambda: Mask(np.ones((3, 3, 3), bool)), r"\[height width\]; got shape \(3, 3, 3\)"),
        (lambda: Mask(np.full((3, 3), 7)), "labels == 7"),
    ],
)
def test_regions_that_make_no_sense(make, message):
    with pytest.raises(LayoutError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Box.from_xywh(3, 4, 0, 5), "box needs a positive width and height in pixels; got 0 x 5"),
        (lambda: Box.from_xywh(3, 4, 5, float("nan")), "positive width and height"),
        (lambda: Box.from_fractions(10, 20, 30, 40, 100, 100), "Fractions lie in 0 to 1"),
        (lambda: Box.from_fractions(0.1, 0.2, 0.3, float("nan"), 100, 100), "Fractions lie in 0 to 1"),
        (lambda: Box.from_fractions(0.5, 0.2, 0.3, 0.4, 100, 100), "x0 < x1"),
        (
            lambda: Box.from_fractions(0.1, 0.2, 0.3, 0.4, 0, 100),
            "positive width and height in pixels; got 0 x",
        ),
        (lambda: Box.from_points([]), "Points are pairs"),
        (lambda: Box.from_points([(1, 2, 3)]), "Points are pairs"),
        (lambda: Box.from_points([(1, 2), (1, 9)]), "x0 < x1"),
    ],
)
def test_other_ways_to_a_box_reject_what_is_none(make, message):
    with pytest.raises(LayoutError, match=message):
        make()


def test_other_ways_to_a_box():
    assert Box.from_xywh(10, 20, 30, 5, image=2) == Box(10, 20, 40, 25, image=2)
    assert Box.from_fractions(0.25, 0, 1, 0.5, width=200, height=80, image=1) == Box(50, 0, 200, 40, image=1)
    triangle = np.random.default_rng(0).integers(0, 100, (3, 2))
    low, high = triangle.min(0), triangle.max(0)
    assert Box.from_points(triangle, image=3) == Box(*low, *high, image=3)
    assert Box.from_points([(9, 2), (4, 7)]) == Box(4, 2, 9, 7)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Box(0.2, 0.3, 0.4, 0.5),
        lambda: Box(0, 0, 0.5, 1),
        lambda: Box(0.0, 0.0, 1.0, 1.0),
        lambda: Frames(box=(0.2, 0.3, 0.4, 0.5)),
        lambda: Tube({0.0: (10, 10, 20, 20), 1.0: (0.2, 0.3, 0.4, 0.5)}),
    ],
)
def test_a_box_in_fractions_gives_a_warning(make):
    with pytest.warns(UserWarning, match=r"in pixels of the original.*Box\.from_fractions"):
        make()


def test_small_boxes_in_pixels_give_none():
    # warnings are errors in these tests
    for box in (Box(0, 0, 1, 1), Box(0, 0.2, 0.4, 1.5), Frames(box=(0, 0, 1, 1)), Tube({0.0: (0, 0, 1, 1)})):
        assert moved(box, None, None) is box
    assert moved(Frames(box=(0, 0, 1, 1)), None, 2).box == (0, 0, 1, 1)
    assert moved(Box(0, 0, 1, 1), None, 1) == Frames(video=1, box=Box(0, 0, 1, 1))


ONE, CLIP = image(30, 20, 3, 2), video(30, 20, 3, 2, times=(0.0, 1.0, 2.0))


def test_something_that_is_no_region():
    found = layout(ONE)
    for what, name in ([(0, 0, 5, 5)], "tuple"), ((0, 0, 5, 5), "int"), ([Box(0, 0, 5, 5), None], "NoneType"):
        with pytest.raises(LayoutError, match=f"or a list of them; got {name}"):
            found.target(what)


@pytest.mark.parametrize("box", [(1, 2, 3, 4), [1.0, 2.0, 3.0, 4.0], np.array([1, 2, 3, 4]), Box(1, 2, 3, 4)])
def test_a_box_in_each_form_is_four_numbers(box):
    assert corners(box) == (1.0, 2.0, 3.0, 4.0)


def test_a_tube_between_its_times_is_interpolated_by_numpy():
    boxes = {0.0: (0, 0, 10, 10), 2.0: (20, 4, 50, 10), 3.0: None, 5.0: (0, 0, 1, 1)}
    tube = Tube(boxes)
    for time in np.linspace(0, 2, 9):
        expected = [np.interp(time, [0, 2], [boxes[0.0][i], boxes[2.0][i]]) for i in range(4)]
        np.testing.assert_allclose(tube.at(float(time)), expected)
    assert [tube.at(t) for t in (-0.1, 3.0, 5.1)] == [None, None, None]


def test_times_of_a_tube_are_finite_and_sorted_as_numbers():
    for time in (None, float("nan"), float("inf")):
        with pytest.raises(LayoutError, match="times of a tube are finite numbers"):
            Tube({time: (0, 0, 4, 5)})
    assert Tube({10: (10, 0, 20, 9), "2": (2, 0, 12, 9)}).at(6) == (6.0, 0.0, 16.0, 9.0)

"""Figures: text with dollar signs is drawn as it is where it is no math."""

import io

import numpy as np
import pytest
from matplotlib.text import Text

from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.plots import head_map
from hooked_mllm.plots.figure import as_array, new_figure


def drawn(title):
    figure = head_map(np.eye(2), title=title)
    figure.savefig(io.BytesIO())
    return next(text for text in figure.findobj(Text) if text.get_text() == title)


@pytest.mark.parametrize(
    ("title", "is_math"), [("$x_$", False), ("$\\undefined{x}$", False), ("$\\rho_{0.5}$", True), ("costs $5", False)]
)
def test_only_valid_math_is_read_as_math(title, is_math):
    assert drawn(title).get_parse_math() is is_math


def test_the_picture_of_text_without_math_has_its_dollar_signs():
    with_dollars, without = (new_figure(3.0, 1.0) for _ in range(2))
    with_dollars.suptitle("$5 {to $6")
    without.suptitle("5 {to 6")
    widths = []
    for figure in (with_dollars, without):
        figure.canvas.draw()
        (text,) = (t for t in figure.findobj(Text) if t.get_text())
        widths.append(text.get_window_extent().width)
    assert widths[0] > widths[1]


def test_values_that_are_no_numbers():
    with pytest.raises(InputError, match="should be an array of numbers"):
        as_array(["many"], "scores")
    with pytest.raises(NumericsError, match="1 infinities"):
        as_array([1.0, np.inf], "scores")
    assert np.isnan(as_array([np.nan], "scores")).all()

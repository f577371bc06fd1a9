"""Bars of groups of heads, read back from the figure."""

import numpy as np
import pytest

from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.plots import group_bars


def test_bars_are_means_and_dots_are_heads():
    figure = group_bars(
        {"A": {"top 2": [0.5, 0.7], "bottom 2": [0.1, 0.0]}, "B": {"top 2": [0.3], "bottom 2": [0.2, 0.2]}},
        ylabel="KTR",
    )
    axes = figure.axes[0]
    assert [round(bar.get_height(), 6) for bar in axes.patches] == [0.6, 0.3, 0.05, 0.2]
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.7], [0.3], [0.1, 0.0], [0.2, 0.2]]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    np.testing.assert_allclose(centres, [-0.2, 0.8, 0.2, 1.2])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["A", "B"] and axes.get_ylabel() == "KTR"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["top 2", "bottom 2"]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({}, InputError, "same groups of heads"),
        ({"A": {"top": [1.0]}, "B": {"bottom": [1.0]}}, InputError, "same groups of heads"),
        ({"A": {"top": []}}, InputError, "scores of one head or more"),
        ({"A": {"top": [float("inf")]}}, NumericsError, "infinities"),
    ],
)
def test_bars_that_cannot_be_drawn(groups, error, message):
    with pytest.raises(error, match=message):
        group_bars(groups)

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from hooked_mllm.errors import InputError
from hooked_mllm.metrics import CoverageCurve
from hooked_mllm.plots import coverage_curve


def test_curves_are_drawn_as_given():
    figure = coverage_curve({"RAM": torch.tensor([0.25, 0.5, 1.0]), "random": [0.0, 0.25, 0.25]})
    axes = figure.axes[0]
    ram, control = axes.lines
    np.testing.assert_array_equal(ram.get_xydata(), [[1, 0.25], [2, 0.5], [3, 1.0]])
    np.testing.assert_array_equal(control.get_ydata(), [0, 0.25, 0.25])
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["RAM", "random"]
    assert axes.get_ylim() == (0, 1.02)
    assert plt.get_fignums() == []


def test_one_curve_with_its_own_ks():
    (line,) = coverage_curve(np.array([0.1, 0.9]), ks=[10, 250]).axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), [10, 250])


def test_a_measured_curve_brings_its_ks():
    measured = CoverageCurve(ks=[0, 5, 50], coverage=[0.0, 0.5, 0.75], n_samples=2, share=0.05)
    (line,) = measured.plot().axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 0.0], [5, 0.5], [50, 0.75]])
    first, second = coverage_curve({"RAM": measured, "random": [0.1, 0.2]}, ks=[3, 4]).axes[0].lines
    np.testing.assert_array_equal(first.get_xdata(), [0, 5, 50])
    np.testing.assert_array_equal(second.get_xdata(), [3, 4])


@pytest.mark.parametrize(
    ("curves", "ks", "message"),
    [
        ({}, None, "at least one curve"),
        ({"a": [[0.1]]}, None, r"shape \(1, 1\)"),
        ({"a": []}, None, r"shape \(0,\)"),
        ({"a": [0.1, 1.2]}, None, "share from 0 to 1"),
        ({"a": [0.1, float("nan")]}, None, "share from 0 to 1"),
        ({"a": [0.1, 0.2]}, [1], "2 values for 1 numbers of heads"),
    ],
    ids=["none", "2d", "empty", "range", "nan", "ks"],
)
def test_bad_curves(curves, ks, message):
    with pytest.raises(InputError, match=message):
        coverage_curve(curves, ks)

import matplotlib.pyplot as plt
import numpy as np
import pytest

from hooked_mllm.errors import InputError
from hooked_mllm.plots import prefill


def test_means_and_speedups_are_drawn():
    times = {
        "cuDNN": {16384: [30.0, 34.0], 8192: [10.0]},
        "hybrid": {8192: [5.0], 16384: [8.0, 8.0]},
        "cuDNN, rest compiled": {8192: 4.0},
        "eager": {},
    }
    latency, speedup = prefill(times).axes
    cudnn, hybrid, compiled = latency.lines
    np.testing.assert_array_equal(cudnn.get_xydata(), [[8192, 10], [16384, 32]])
    np.testing.assert_array_equal(hybrid.get_xydata(), [[8192, 5], [16384, 8]])
    np.testing.assert_array_equal(compiled.get_xydata(), [[8192, 4]])
    assert (cudnn.get_linestyle(), compiled.get_linestyle()) == ("-", ":")
    assert compiled.get_color() == cudnn.get_color() != hybrid.get_color()
    np.testing.assert_array_equal([line.get_ydata() for line in speedup.lines[:2]], [[1, 1], [2, 4]])
    assert speedup.get_ylabel() == "speedup over cuDNN"
    figure = latency.figure
    figure.canvas.draw()
    assert [t.get_text() for t in latency.get_xticklabels()] == ["8k", "16k"]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["cuDNN", "hybrid", "cuDNN, rest compiled"]
    assert plt.get_fignums() == []


def test_another_base():
    _, speedup = prefill({"a": {100: 4.0}, "b": {100: 1.0, 200: 2.0}}, "b").axes
    assert [list(line.get_ydata()) for line in speedup.lines] == [[0.25], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("times", "base", "message"),
    [
        ({}, None, "at least one variant"),
        ({"a": {}}, None, "at least one variant"),
        ({"a": {100: 1.0}}, "b", "one of \\['a'\\]; got 'b'"),
        ({"a": {100: []}}, None, "positive milliseconds"),
        ({"a": {100: [1.0, -1.0]}}, None, "positive milliseconds"),
        ({"a": {100: "fast"}}, None, "array of numbers"),
    ],
    ids=["none", "empty", "base", "no-times", "negative", "text"],
)
def test_bad_times(times, base, message):
    with pytest.raises(InputError, match=message):
        prefill(times, base)

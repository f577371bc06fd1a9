import matplotlib.pyplot as plt
import numpy as np
import pytest

from hooked_mllm.bench import PrefillRecord
from hooked_mllm.bench.record import Cell
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


def record(*cells, titles=("hybrid-2", "sdpa", "eager")):
    known = {"hybrid-2": "hybrid, 2 dense", "sdpa": "SDPA, torch's choice", "eager": "eager", "cudnn": "cuDNN"}
    return PrefillRecord({"model": "tiny"}, titles={name: known[name] for name in titles}, cells=list(cells))


def test_a_record_read_from_disk(tmp_path):
    """Under its titles, speedups over what its table compares with; what failed is left out."""
    cells = [Cell(64, "hybrid-2", [2.0, 4.0]), Cell(64, "sdpa", [6.0]), Cell(64, "eager", failed="out of memory")]
    record(*cells, Cell(128, "sdpa", [9.0])).save(tmp_path / "prefill.json")
    read = PrefillRecord.load(tmp_path / "prefill.json")
    latency, speedup = prefill(read).axes
    hybrid, sdpa = latency.lines
    assert [line.get_label() for line in latency.lines] == ["hybrid, 2 dense", "SDPA, torch's choice"]
    np.testing.assert_array_equal(hybrid.get_xydata(), [[64, 3]])
    np.testing.assert_array_equal(sdpa.get_xydata(), [[64, 6], [128, 9]])
    assert [list(line.get_ydata()) for line in speedup.lines] == [[2.0], [1.0, 1.0]]
    assert latency.get_title() == "tiny" and speedup.get_ylabel() == "speedup over SDPA, torch's choice"
    latency, speedup = prefill(read, "hybrid, 2 dense", title="mine").axes
    assert latency.get_title() == "mine" and list(speedup.lines[1].get_ydata()) == [0.5]


def test_a_record_without_its_usual_base():
    """Speedups are over the first variant that has times."""
    failed = [Cell(64, "cudnn", failed="out of memory"), Cell(64, "hybrid-2", [2.0])]
    _, speedup = prefill(record(*failed, titles=("cudnn", "hybrid-2"))).axes
    assert speedup.get_ylabel() == "speedup over hybrid, 2 dense"
    with pytest.raises(InputError, match="at least one variant"):
        prefill(record(*failed[:1], titles=("cudnn",)))


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

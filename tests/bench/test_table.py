"""A record as text: ratios, the ceiling, failures, and rows of several runs."""

import pytest

from hooked_mllm.bench.record import Cell, PrefillRecord
from hooked_mllm.bench.table import table

TITLES = {"cudnn": "cuDNN", "flash": "FA2", "hybrid-2": "hybrid, 2 dense", "removed": "attention removed"}
SETTINGS = {"model": "tiny", "n_layers": 3, "n_heads": 4, "dtype": "float32", "devices": ["a", "b"], "runs": 2}


def record(*cells, titles=TITLES):
    made = PrefillRecord({**SETTINGS, "clock": "CUDA events"}, titles=titles)
    made.add(cells)
    return made


def line(text, start):
    """The columns of the line of one title."""
    (found,) = [row for row in text.splitlines() if row.startswith(start)]
    return found.removeprefix(start).split()


def test_every_row_has_its_ratios_and_the_ceiling():
    text = table(
        record(
            Cell(1024, "cudnn", [8.0, 8.0], peak_gib=2.25, first_s=1.5),
            Cell(1024, "flash", [16.0, 16.0]),
            Cell(1024, "hybrid-2", [3.0, 5.0]),
            Cell(1024, "removed", [2.0, 2.0]),
        )
    )
    assert text.splitlines()[0] == "tiny: 3 layers x 4 heads, float32, a + b; timed forward passes: 2, CUDA events"
    assert "1,024 tokens" in text and "x cuDNN" in text
    assert line(text, "cuDNN") == ["8.0", "0.0", "1.00", "2.00", "4.00", "2.2", "1.5"]
    assert line(text, "hybrid, 2 dense") == ["4.0", "1.4", "2.00", "4.00", "4.00"]
    assert line(text, "attention removed")[2:] == ["4.00", "8.00", "4.00"]


def test_without_cudnn_ratios_are_to_sdpa():
    titles = {"sdpa": "SDPA", "hybrid-2": "hybrid"}
    text = table(record(Cell(64, "sdpa", [4.0]), Cell(64, "hybrid-2", [1.0]), titles=titles))
    assert "x SDPA" in text and "x cuDNN" not in text
    assert line(text, "hybrid") == ["1.0", "0.0", "4.00"]


@pytest.mark.parametrize("sessions", [(0, 0), (0, 1)])
def test_rows_of_several_runs_are_marked(sessions):
    cells = [Cell(64, name, [1.0], session=s) for name, s in zip(("cudnn", "flash"), sessions, strict=True)]
    assert ("were not interleaved" in table(record(*cells))) == (sessions == (0, 1))


def test_a_failure_takes_the_place_of_the_times():
    text = table(record(Cell(64, "cudnn", [1.0]), Cell(64, "hybrid-2", failed="out of memory")))
    assert line(text, "hybrid, 2 dense") == ["out", "of", "memory"]

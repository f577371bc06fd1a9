"""Records of a benchmark on disk."""

import json

import pytest
import torch

from helpers.bench_variants import bench, variants
from hooked_mllm.bench.record import KIND, Cell, PrefillRecord, provenance
from hooked_mllm.errors import CacheFileError, InputError


def test_a_damaged_record_is_not_continued(model, tmp_path):
    out = tmp_path / "prefill.json"
    out.write_text(json.dumps({"kind": "something else"}))
    with pytest.raises(CacheFileError, match="something else"):
        bench(model, variants("sdpa"), [40], out=out, resume=True)


@pytest.fixture
def record():
    cells = [
        Cell(64, "cudnn", [4.0, 2.0]),
        Cell(64, "hybrid-2", [1.0, 2.0], peak_gib=1.5, first_s=0.25),
        Cell(32, "cudnn", [1.0]),
        Cell(32, "hybrid-2", failed="out of memory"),
    ]
    made = PrefillRecord({"model": "tiny", "runs": 2, "heads": {"2": ["L0H1"]}}, titles={"cudnn": "cuDNN"})
    made.add(cells)
    return made


def test_cells_are_found_by_length_and_variant(record):
    assert record.contexts == [32, 64] and [c.context for c in record.cells] == [32, 32, 64, 64]
    assert record.cell(64, "cudnn").ms == [4.0, 2.0] and record.cell(96, "cudnn") is None
    assert record.times("hybrid-2") == {64: [1.0, 2.0]} and record.times("cudnn") == {32: [1.0], 64: [4.0, 2.0]}


def test_a_ratio_is_that_of_the_means(record):
    assert record.speedup(64, "hybrid-2", "cudnn") == 3.0 / 1.5
    assert record.speedup(32, "hybrid-2", "cudnn") is None and record.speedup(96, "cudnn", "cudnn") is None
    assert record.base == "cudnn" and PrefillRecord({}).base == "sdpa"


def test_mean_and_spread_of_a_cell(record):
    assert (record.cell(64, "cudnn").mean, record.cell(64, "cudnn").spread) == (3.0, pytest.approx(2**0.5))
    assert record.cell(32, "cudnn").spread == 0.0


def test_what_is_read_is_what_was_written(record, tmp_path):
    record.save(tmp_path / "prefill.json")
    assert PrefillRecord.load(tmp_path / "prefill.json") == record
    content = json.loads((tmp_path / "prefill.json").read_text())
    assert content["kind"] == KIND and content["cells"][3]["peak_gib"] == 1.5


def test_a_record_is_continued_with_more_heads_and_the_same_settings(record):
    continued = record.continued({"model": "tiny", "runs": 2, "length": 9, "heads": {"4": ["L1H1"]}})
    assert continued is record and record.settings["length"] == 9
    assert record.settings["heads"] == {"2": ["L0H1"], "4": ["L1H1"]}


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"runs": 3}, "runs"), ({"model": "x"}, "model"), ({"heads": {"2": ["L0H0"]}}, "2 dense heads")],
)
def test_a_record_of_other_settings(record, settings, what):
    with pytest.raises(InputError, match=rf"other settings \({what}\).*another --out"):
        record.continued(settings)


def test_where_a_record_was_made():
    made = provenance([torch.device("cpu")])
    assert made["torch"] == torch.__version__ and made["cudnn"] is None
    assert "threads" in made["devices"][0] and json.loads(json.dumps(made)) == made

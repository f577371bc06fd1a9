"""Prefill times of variants in turns, stopped and continued."""

import statistics
from pathlib import Path

import pytest
import torch

from helpers.bench_variants import bench, registered, variants
from hooked_mllm import HeadScores, HeadSet
from hooked_mllm.bench import PrefillRecord, Variant, choose_heads
from hooked_mllm.bench.table import table
from hooked_mllm.errors import HeadError, InputError


def test_every_cell_is_timed_in_turns(model, monkeypatch):
    order, on = [], Variant.on
    monkeypatch.setattr(Variant, "on", lambda self, *args: order.append(self.name) or on(self, *args))
    record = bench(model, variants("sdpa", "hybrid", "removed"), [96, 40])
    names = ["sdpa", "hybrid-2", "removed"]
    assert order[-3 * 3 :] == names * 3  # the last length: one warm-up and two rounds
    assert [(c.context, c.variant) for c in record.cells] == [(n, v) for n in (40, 96) for v in names]
    for cell in record.cells:
        assert len(cell.ms) == 2 and min(cell.ms) > 0 and cell.failed is None and cell.first_s > 0
        assert cell.mean == pytest.approx(statistics.fmean(cell.ms))
        assert cell.spread == pytest.approx(statistics.stdev(cell.ms))
    assert record.settings["heads"] == {"2": ["L0H1", "L2H3"]} and record.settings["clock"].startswith("perf_counter")
    assert record.speedup(96, "removed", "sdpa") == record.cell(96, "sdpa").mean / record.cell(96, "removed").mean
    checked = {row["variant"]: row for row in record.checks}
    assert set(checked) == {"sdpa", "hybrid-2"}
    assert all(row["layer"] < 1e-5 and row["last_hidden_state"] < 1e-4 for row in checked.values())


def test_out_of_memory_is_recorded_and_passed_over(model, tmp_path):
    def attention(module, q, k, v, mask, scaling, **kwargs):
        if q.shape[2] > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return z.transpose(1, 2), None

    (base,) = variants("sdpa")
    small = Variant("small", "short contexts alone", registered("small_memory", attention), exact=False)
    out = tmp_path / "prefill.json"
    record = bench(model, [small, base], [40, 64, 80], out=out)
    assert [record.cell(n, "small").failed for n in (40, 64, 80)] == [None, "out of memory", "out of memory"]
    assert list(record.times("small")) == [40] and list(record.times("sdpa")) == [40, 64, 80]
    assert record.speedup(64, "small", "sdpa") is None and record.cell(64, "small").ms == []
    assert PrefillRecord.load(out) == record
    rows = [line for line in table(record).splitlines() if line.startswith("short contexts")]
    assert ["out of memory" in row for row in rows] == [False, True, True]


def test_stopped_and_continued(model, tmp_path):
    out = tmp_path / "prefill.json"
    calls = []

    def attention(module, q, k, v, mask, scaling, **kwargs):
        calls.append(q.shape[2])
        if q.shape[2] == 64 and len(calls) < 1000:
            calls.extend([0] * 1000)  # once
            raise KeyboardInterrupt
        return q.transpose(1, 2), None

    (base,) = variants("sdpa")
    stopping = Variant("stopping", "stopping", registered("stopping", attention), exact=False)
    with pytest.raises(KeyboardInterrupt):
        bench(model, [base, stopping], [40, 64], out=out)
    kept = PrefillRecord.load(out)
    assert kept.contexts == [40] and len(kept.cells) == 2
    with pytest.raises(InputError, match="--resume continues it"):
        bench(model, [base, stopping], [40, 64], out=out)
    before = len(calls)
    record = bench(model, [base, stopping], [40, 64], out=out, resume=True)
    assert set(calls[before:]) == {64}  # what was done is not done again
    assert record.cell(40, "sdpa") == kept.cell(40, "sdpa")
    assert [c.session for c in record.cells] == [0, 0, 1, 1] and len(record.sessions) == 2
    more = bench(model, [base, *variants("hybrid")], [40], out=out, resume=True)
    assert "rows of several runs" in table(more) and more.cell(40, "hybrid-2").session == 2
    unchanged = out.read_bytes()
    assert bench(model, [base], [64], out=out, resume=True) == more and out.read_bytes() == unchanged
    for change, what in (({"runs": 3}, "runs"), ({"seed": 1}, "seed"), ({"name": "other"}, "model")):
        with pytest.raises(InputError, match=f"other settings .*{what}"):
            bench(model, [base], [96], out=out, resume=True, **change)
    other = HeadSet(["L0H1", "L2H2"], n_layers=3, n_heads=4)
    with pytest.raises(InputError, match="2 dense heads"):
        bench(model, variants("hybrid", heads={2: other}), [96], out=out, resume=True)


def test_random_heads_are_nested_and_seeded():
    found = choose_heads([5, 2, 0, 12], 3, 4, None, seed=3)
    assert [len(found[k]) for k in (0, 2, 5, 12)] == [0, 2, 5, 12] and list(found) == [0, 2, 5, 12]
    assert set(found[2]) <= set(found[5]) <= set(found[12])
    assert found == choose_heads([0, 2, 5, 12], 3, 4, None, seed=3)
    assert set(found[5]) != set(choose_heads([5], 3, 4, None, seed=4)[5])
    with pytest.raises(InputError, match="0 to 12"):
        choose_heads([13], 3, 4, None, seed=0)


def test_dense_heads_are_the_first_of_a_ranking(tmp_path):
    scores = HeadScores([[0.1, 0.9], [0.8, 0.2]], name="RAM")
    scores.save(tmp_path / "scores")
    ranked = [(0, 1), (1, 0), (1, 1), (0, 0)]
    for source in (tmp_path / "scores.json", str(tmp_path / "scores"), "L0H1, L1H0, L1H1, L0H0", ranked):
        chosen = choose_heads([3, 0], 2, 2, source, seed=0)
        assert {k: list(heads) for k, heads in chosen.items()} == {0: [], 3: ranked[:3]}
    assert list(choose_heads([1], 2, 2, Path("L1H0,L0H1"), seed=0)[1]) == [(1, 0)]  # as the command line passes it
    with pytest.raises(InputError, match="ranks 2 heads; got a number of dense heads of 3"):
        choose_heads([3], 2, 2, "L0H1, L1H0", seed=0)
    with pytest.raises(HeadError, match="Layer 2 of head L2H0"):
        choose_heads([1], 2, 2, "L2H0", seed=0)
    with pytest.raises(InputError, match="2 layers x 2 heads; the model has 3 x 4"):
        choose_heads([1], 3, 4, tmp_path / "scores.json", seed=0)

import importlib
import json
import statistics
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from hooked_mllm import HeadSet
from hooked_mllm.attention.registered import register_hybrid_attention
from hooked_mllm.bench import PrefillRecord, Variant, bench_prefill, choose_heads, prefill_variants, random_text_model
from hooked_mllm.bench.check import check_at_length
from hooked_mllm.bench.table import table
from hooked_mllm.errors import CacheFileError, InputError, NumericsError
from hooked_mllm.kernels.hybrid_attention import op

SIZE = {"sink": 4, "window": 16}
TWO = HeadSet(["L0H1", "L2H3"], n_layers=3, n_heads=4)


@pytest.fixture(scope="module")
def model():
    return random_text_model("tiny", dtype=torch.float32)


def variants(*backends, heads=None):
    return prefill_variants(backends, heads or {2: TWO}, implementation="naive", **SIZE)


def bench(model, found, contexts, **more):
    return bench_prefill(model, found, contexts, **{"name": "tiny", "runs": 2, "warm_up": 1, "progress": False, **more})


def registered(name, attention):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda **_: None)
    return name


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


def test_attention_removed_is_the_model_without_it(model):
    """Written out for the tiny Qwen3-VL: the output projection reads the queries."""
    (removed,) = variants("removed")
    ids = torch.arange(30)[None]
    with torch.no_grad(), removed.on(model):
        got = model(input_ids=ids, use_cache=False).last_hidden_state
    handles = []
    for layer in model.layers:
        attn, state = layer.self_attn, {}
        handles.append(attn.q_norm.register_forward_hook(lambda m, a, out, s=state: s.update(q=out)))

        def replace_input(module, args, s=state):
            cos, sin = model.rotary_emb(args[0], torch.arange(30).expand(3, 1, -1))
            q = s["q"]
            half = torch.cat([-q[..., 8:], q[..., :8]], -1)
            return ((q * cos[:, :, None] + half * sin[:, :, None]).flatten(2),)

        handles.append(attn.o_proj.register_forward_pre_hook(replace_input))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, want)


def off_by_one(name, base):
    """Streaming heads that see one key more than they should."""
    register_hybrid_attention(name, TWO, sink=SIZE["sink"], window=SIZE["window"] + 1, implementation="naive")
    return replace(base, attention=name)


def not_causal(name, base):
    def attention(module, q, k, v, mask, scaling, **_):
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return ((q @ k.transpose(2, 3) * scaling).softmax(-1) @ v).transpose(1, 2), None

    return replace(base, attention=registered(name, attention))


@pytest.mark.parametrize(("wrong", "of"), [(off_by_one, "hybrid"), (not_causal, "sdpa")])
def test_nothing_is_timed_where_outputs_are_wrong(model, tmp_path, wrong, of):
    (base,) = variants(of)
    out = tmp_path / "prefill.json"
    with pytest.raises(
        NumericsError, match="attention in some layer differs from the definition by .* nothing is timed"
    ):
        bench(model, [*variants("sdpa"), wrong(f"wrong_{of}", base)], [64], out=out)
    assert not out.exists()


def test_lengths_go_one_way_on_a_cpu(model):
    assert check_at_length(model, variants("sdpa", "hybrid"), 64) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="dense heads go another way on a GPU alone")
def test_the_way_of_long_prompts_is_compared_at_their_length(monkeypatch):
    dispatch = importlib.import_module("hooked_mllm.kernels.hybrid_attention.dispatch")  # it needs Triton
    model = random_text_model("tiny", dtype=torch.bfloat16).to("cuda")
    made = prefill_variants(["hybrid"], {2: TWO}, **SIZE)
    monkeypatch.setattr(op, "SDPA_FROM", 1)
    (row,) = check_at_length(model, made, 3000)
    assert row["length"] == 3000 and 0 < row["one_launch"] < row["limits"][0]

    @contextmanager
    def forgets_the_end(q, k, v, out, dense, scale):
        with dense_by_sdpa(q, k, v, out, dense, scale):
            yield
        out[:, list(dense), -100:] = 0

    dense_by_sdpa = dispatch.dense_by_sdpa
    monkeypatch.setattr(dispatch, "dense_by_sdpa", forgets_the_end)
    with pytest.raises(NumericsError, match="at 3000 tokens, hybrid attention differs from one launch"):
        check_at_length(model, made, 3000)


def test_blocks_compiled_wrongly_are_found(model, monkeypatch):
    (base,) = variants("sdpa")
    doubled = replace(base, name="doubled", compiled=True)
    original = torch.compile

    def faulty(function, **_):
        compiled = original(function, backend="eager")
        return lambda *args, **kwargs: compiled(*args, **kwargs) * 1.5

    monkeypatch.setattr(torch, "compile", faulty)
    with pytest.raises(NumericsError, match="the last hidden state differs"):
        bench(model, [base, doubled], [64])


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


def test_a_damaged_record_is_not_continued(model, tmp_path):
    out = tmp_path / "prefill.json"
    out.write_text(json.dumps({"kind": "something else"}))
    with pytest.raises(CacheFileError, match="something else"):
        bench(model, variants("sdpa"), [40], out=out, resume=True)


def test_random_heads_are_nested_and_seeded():
    found = choose_heads([5, 2, 0, 12], 3, 4, None, seed=3)
    assert [len(found[k]) for k in (0, 2, 5, 12)] == [0, 2, 5, 12] and list(found) == [0, 2, 5, 12]
    assert set(found[2]) <= set(found[5]) <= set(found[12])
    assert found == choose_heads([0, 2, 5, 12], 3, 4, None, seed=3)
    assert set(found[5]) != set(choose_heads([5], 3, 4, None, seed=4)[5])
    with pytest.raises(InputError, match="0 to 12"):
        choose_heads([13], 3, 4, None, seed=0)


def test_names_of_backends():
    with pytest.raises(InputError, match="No backend 'cudn'.*cudnn"):
        prefill_variants(["cudn"], {})
    with pytest.raises(InputError, match="needs numbers of dense heads"):
        prefill_variants(["hybrid"], {})
    names = [v.name for v in prefill_variants(["cudnn", "hybrid", "hybrid-compiled"], {2: TWO})]
    assert names == ["cudnn", "hybrid-2", "hybrid-2-compiled"]

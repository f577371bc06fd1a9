"""Wrong outputs are found before anything is timed."""

import importlib
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.bench_variants import SIZE, TWO, bench, registered, variants
from hooked_mllm import HeadSet
from hooked_mllm.attention.registered import register_hybrid_attention
from hooked_mllm.bench import Variant, prefill_variants, random_text_model
from hooked_mllm.bench.check import Witness, check_at_length, check_variants, largest_error, relative_error
from hooked_mllm.errors import NumericsError
from hooked_mllm.kernels.hybrid_attention import op


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


def test_one_wrong_tile_among_many_is_found():
    expected = torch.randn(1, 4, 5000, 8)
    got = expected.clone()
    got[:, 2, 4096:4160] = 0
    assert relative_error(got, expected) < 0.06 and largest_error(got, expected) > 0.2
    assert largest_error(expected, expected) == 0


@pytest.mark.parametrize("dense", [None, HeadSet(["L1H0", "L1H3"], n_layers=3, n_heads=4)])
def test_the_definition_is_causal_attention_written_out(dense):
    q, k, v = (torch.randn(2, heads, 9, 8) for heads in (4, 2, 2))
    witness = Witness(Variant("v", "v", "sdpa", dense=dense, sink=2, window=3))
    z = witness.defined(1, q, k, v, 0.5)
    for batch, head, i in np.ndindex(2, 4, 9):
        whole = dense is None or head in (0, 3)
        keys = [j for j in range(i + 1) if whole or j < 2 or j > i - 3]
        weights = np.exp((k[batch, head // 2, keys] @ q[batch, head, i]).double().numpy() * 0.5)
        expected = (weights / weights.sum()) @ v[batch, head // 2, keys].double().numpy()
        np.testing.assert_allclose(z[batch, i, head], expected, atol=1e-5)


def test_every_layer_of_a_right_variant_is_within_its_limit(model):
    checks = check_variants(model, [*variants("sdpa", "hybrid"), *variants("removed")], None, 48)
    assert [row["variant"] for row in checks] == ["sdpa", "hybrid-2"], "what computes no attention is not compared"
    for row in checks:
        assert (
            row["length"] == 48 and 0 <= row["layer"] < row["limits"][0] and row["last_hidden_state"] < row["limits"][1]
        )


def test_the_error_is_relative_to_the_expected_norm():
    x, y = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])
    assert relative_error(x, y) == pytest.approx(4 / 3) and relative_error(y, x) == pytest.approx(4 / 5)

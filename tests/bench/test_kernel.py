import json

import pytest
import torch

from hooked_mllm.bench import bench_kernel
from hooked_mllm.bench import kernel as module
from hooked_mllm.bench.check import largest_error, relative_error
from hooked_mllm.bench.timing import failure
from hooked_mllm.errors import InputError, NumericsError

SMALL = {"dense": 1, "heads": 4, "kv_heads": 2, "d_head": 16, "sink": 4, "window": 16, "rounds": 2, "device": "cpu"}


def test_times_and_checks(tmp_path):
    out = tmp_path / "kernel.json"
    found = bench_kernel([64, 96], **SMALL, out=out)
    assert json.loads(out.read_text()) == {"kind": module.KIND, **found}
    assert list(found["lengths"]) == ["64", "96"]
    for rows in found["lengths"].values():
        assert list(rows) == ["SDPA, all dense", "hybrid, none dense", "hybrid, 1 dense", "hybrid, all dense"]
        assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 and row["failed"] is None for row in rows.values())
    assert [c["against"] for c in found["checks"]][:3] == [f"float64, {k} dense" for k in (0, 1, 4)]
    assert all(c["error"] < 1e-6 for c in found["checks"])


def test_one_wrong_tile_among_many_is_found():
    want = torch.randn(1, 4, 5000, 8)
    got = want.clone()
    got[:, 2, 4096:4160] = 0
    assert relative_error(got, want) < 0.06 and largest_error(got, want) > 0.2
    assert largest_error(want, want) == 0


def test_what_is_no_reason_to_stop():
    assert failure(torch.OutOfMemoryError("full")) == "out of memory"
    assert failure(RuntimeError("No available kernel. Aborting execution.")) == "no such kernel"
    assert failure(RuntimeError("shapes differ")) is None


def test_the_table_gives_ratios_of_rounds(tmp_path):
    found = bench_kernel([64], **SMALL)
    rows = found["lengths"]["64"]
    rows["SDPA, all dense"]["ms"], rows["hybrid, none dense"]["ms"] = [8.0, 6.0], [2.0, 1.0]
    rows["hybrid, all dense"] |= {"ms": [], "failed": "out of memory"}
    lines = {line[:18]: line for line in module.kernel_table(found).splitlines()}
    assert lines["hybrid, none dense"].split()[-3:] == ["1.500", "5.00", "4.00-6.00"]
    assert lines["hybrid, all dense "].endswith("out of memory")


def test_no_ratio_where_outputs_differ(monkeypatch, tmp_path):
    right = module.hybrid_attention
    monkeypatch.setattr(module, "hybrid_attention", lambda *args, **how: right(*args, **{**how, "sink": 5}))
    with pytest.raises(NumericsError, match=r"0 dense heads differs from the definition in float64 .*nothing is timed"):
        bench_kernel([64], **SMALL, out=tmp_path / "kernel.json")
    assert not list(tmp_path.iterdir())


def test_heads_that_cannot_be():
    with pytest.raises(InputError, match="5 dense of 4 heads"):
        bench_kernel([64], **{**SMALL, "dense": 5})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # of torch's own, while it compiles
def test_on_the_gpu_with_flex_attention():
    found = bench_kernel([2048], rounds=2)
    assert {"cuDNN, all dense", "FlashAttention-2, all dense", "FlexAttention, 4 dense"} <= set(
        found["lengths"]["2048"]
    )
    assert any(c["against"] == "FlexAttention" and c["error"] < 6e-3 for c in found["checks"])

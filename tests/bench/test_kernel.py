"""Times of the op alone, its checks and its table."""

import json
import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hooked_mllm.bench import bench_kernel
from hooked_mllm.bench import kernel as module
from hooked_mllm.errors import InputError, NumericsError

SMALL = {"dense": 1, "heads": 4, "kv_heads": 2, "d_head": 16, "sink": 4, "window": 16, "rounds": 2, "device": "cpu"}


def test_times_and_checks(tmp_path):
    out = tmp_path / "kernel.json"
    found = bench_kernel([64, 96], **SMALL, out=out)
    written = json.loads(out.read_text())
    assert len(written.pop("digest")) == 32 and written == {"kind": module.KIND, **found}
    assert list(found["lengths"]) == ["64", "96"]
    for rows in found["lengths"].values():
        assert list(rows) == ["SDPA, all dense", "hybrid, none dense", "hybrid, 1 dense", "hybrid, all dense"]
        assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 and row["failed"] is None for row in rows.values())
    assert [c["against"] for c in found["checks"]][:3] == [f"float64, {k} dense" for k in (0, 1, 4)]
    assert all(c["error"] < 1e-6 for c in found["checks"])


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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_mask_of_hybrid_attention():
    """Under the type checks of the tests too, where FlexAttention could not count a checked function's arguments."""
    n, sink, window = 20, 2, 5
    dense = [False, True, False, True]
    mask = module.hybrid_mask(torch.tensor(dense), sink, window)
    index = [torch.arange(size) for size in (1, 4, n, n)]
    batch, head, query, key = torch.meshgrid(*index, indexing="ij")  # each [batch head query key]
    expected = [
        [[k <= q and (flag or k < sink or k > q - window) for k in range(n)] for q in range(n)] for flag in dense
    ]
    assert mask(batch, head, query, key)[0].tolist() == expected

    blocks = create_block_mask(mask, None, 4, n, n, device="cpu")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    z = flex_attention(q, k, v, block_mask=blocks, enable_gqa=True)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) / 8**0.5
    pattern = scores.masked_fill(~torch.tensor(expected), -math.inf).softmax(-1)
    torch.testing.assert_close(z, pattern @ v.repeat_interleave(2, 1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")  # of torch's own, while it compiles
def test_on_the_gpu_with_flex_attention():
    found = bench_kernel([2048], rounds=2)
    assert {"cuDNN, all dense", "FlashAttention-2, all dense", "FlexAttention, 4 dense"} <= set(
        found["lengths"]["2048"]
    )
    assert any(c["against"] == "FlexAttention" and c["error"] < 6e-3 for c in found["checks"])

"""The kernels of attention profiles against the definition; without a GPU, under Triton's interpreter."""

import pytest
import torch

from helpers.profile_case import SMALL, Case
from helpers.triton_interpreter import DEVICE, DTYPES, GPU
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.errors import HookValueError, NumericsError
from hooked_mllm.kernels.attention_profile.largest import triton_top_mask
from hooked_mllm.kernels.attention_profile.launch import triton_attention_profile
from hooked_mllm.measuring.attention_view import AttentionView

CASES = {
    "one key": dict(batch=1, heads=2, kv=2, queries=1, keys=1),
    "odd": dict(batch=1, heads=4, kv=2, queries=5, keys=63),
    "one more than blocks": dict(batch=2, heads=4, kv=2, queries=9, keys=65, uneven=True),
    "one head a group": dict(batch=1, heads=3, kv=3, queries=30, keys=70),
    "several tiles of queries": dict(batch=2, heads=4, kv=2, queries=40, keys=70, layers=1, uneven=True),
    "the same where heads stream": dict(batch=1, heads=2, kv=1, queries=70, keys=90, layers=1, streaming=((1,), 3, 12)),
    "seven heads a group": dict(batch=1, heads=7, kv=1, queries=9, keys=70),
    "padded": dict(batch=2, heads=4, kv=1, queries=7, keys=67, padded=True, uneven=True),
    "streaming": dict(batch=1, heads=4, kv=1, queries=6, keys=130, streaming=((), 5, 20)),
    "some stream": dict(batch=2, heads=8, kv=2, queries=3, keys=90, streaming=((0, 5), 0, 1)),
    "streaming and padded": dict(batch=2, heads=6, kv=3, queries=4, keys=99, streaming=((1,), 7, 9), padded=True),
    "sink beyond the sequence": dict(batch=1, heads=4, kv=2, queries=4, keys=50, streaming=((), 99, 2)),
    "forty heads": dict(batch=1, heads=36, kv=4, queries=2, keys=33, layers=1, streaming=((33, 35), 2, 4)),
}
if GPU:
    CASES["1000"] = dict(batch=2, heads=8, kv=2, queries=64, keys=1000, padded=True, uneven=True)
    CASES["1023"] = dict(batch=1, heads=8, kv=2, queries=64, keys=1023, streaming=((0, 5), 64, 200))


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_against_the_definition(case):
    made = Case(**CASES[case], d=16)
    splits = None if list(CASES).index(case) % 2 else 3  # chunks of keys
    assert torch.allclose(made.kernel(splits=splits).double(), made.naive(), atol=2e-6)


@pytest.mark.parametrize("d", [16, 64, 72, 80, 96, 128, 256] if GPU else [24, 72, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_and_dtypes(d, dtype):
    length = (64, 1000) if GPU else (3, 33)
    made = Case(1, 4, 1, *length, d, dtype=dtype, layers=2 if GPU else 1)
    # the definition reads the very same numbers in float64: what is left is the error of float32 arithmetic
    assert torch.allclose(made.kernel(None if GPU else SMALL).double(), made.naive(), atol=3e-6)


@pytest.mark.skipif(not GPU, reason="the tiles that a GPU is given are slow in the interpreter")
@pytest.mark.parametrize(
    ("group", "queries", "dtype"),
    [
        *[(g, n, torch.bfloat16) for g, n in ((1, 17), (2, 64), (4, 1), (4, 300), (7, 64))],
        *[(4, 64, dtype) for dtype in DTYPES],
    ],
    ids=str,
)
def test_the_grid_on_a_gpu(group, queries, dtype):
    for keys in (300, 1000, 1023, 4097):
        for options in ({}, {"padded": True, "uneven": True}, {"streaming": ((0,), 64, 200)}):
            made = Case(2, 2 * group, 2, min(queries, keys // 2), keys, 128, dtype=dtype, **options)
            found = made.kernel(None)
            assert torch.allclose(found.double(), made.naive(), atol=3e-6)
            assert torch.equal(found, made.kernel(None)), "not the same twice"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU, better two")
def test_on_every_gpu_whichever_is_the_current_one():
    made = Case(2, 8, 2, 30, 500, 128, dtype=torch.bfloat16, padded=True)
    expected = made.kernel(None)
    marks = triton_top_mask(expected.to(DEVICE), 25)
    for gpu in range(torch.cuda.device_count()):
        q, k = ([x.to(f"cuda:{gpu}") for x in some] for some in (made.q, made.k))
        rest = [x.to(f"cuda:{gpu}") for x in (made.places, made.weight, made.start, made.end)]
        found = triton_attention_profile(q, k, made.scale, *rest, made.streaming)
        assert found.device.index == gpu and torch.equal(found.cpu(), expected)
        assert torch.equal(triton_top_mask(found, 25).cpu(), marks.cpu())


def test_the_same_twice():
    made = Case(1, 4, 2, 9, 50, 16, dtype=torch.float16, layers=1)
    assert torch.equal(made.kernel(splits=2), made.kernel(splits=2))


def test_inputs_of_any_stride_and_layers_of_different_ones():
    made = Case(2, 4, 2, 5, 40, 16, padded=True)
    expected = made.kernel()
    made.q[0], made.k[1] = made.q[0].contiguous(), made.k[1].contiguous()
    assert torch.allclose(made.kernel(), expected, atol=1e-6)
    storage = torch.zeros(2 * 40 * 2 * 16 * 2 + 1, device=DEVICE)  # neither aligned nor dense
    view = storage[1:].as_strided((2, 2, 40, 16), (40 * 64, 32, 64, 2))
    view.copy_(made.k[0])
    made.k = [view, view]
    assert torch.allclose(made.kernel().double(), made.naive(), atol=2e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter
def test_extreme_scores():
    made = Case(1, 4, 2, 6, 50, 16, sharpness=50.0)  # q . k up to 1e4
    made.scale = [1.0, 1.0]
    assert torch.allclose(made.kernel().double(), made.naive(), atol=2e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter
def test_nan_and_infinity_never_pass_and_never_come_from_padding():
    made = Case(2, 2, 1, 5, 40, 16, padded=True)
    expected = made.kernel()
    for layer in range(2):
        made.k[layer][0, :, : int(made.start[0])] = torch.nan
        made.k[layer][1, :, int(made.end[1]) :] = torch.inf
    assert torch.equal(made.kernel(), expected)
    for value in (torch.nan, torch.inf):
        spoilt = Case(2, 4, 2, 2, 20, 16)
        spoilt.k[1][1, 0, 0, 3] = value
        found = spoilt.kernel()
        assert found[1, 1, :2].isnan().any(-1).all()
        found[1, 1, :2] = 0
        assert found.isfinite().all()


def test_rows_without_a_visible_key_count_zero():
    made = Case(1, 2, 1, 4, 30, 16, padded=True)
    made.places[0, :2] = 0  # before the first real key
    found = made.kernel()
    assert torch.allclose(found.double(), made.naive(), atol=2e-6)
    assert torch.allclose(found.sum(-1), torch.full((2, 1, 2), 0.5), atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in the interpreter
@pytest.mark.parametrize("stream", [False, True])
def test_a_view_reads_the_same_by_the_kernel_as_by_torch(stream, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    n, padding = 45, torch.zeros(2, 45, dtype=torch.bool)
    padding[1, :9] = True
    masks = {"padding": padding, "question": torch.zeros_like(padding), "target": torch.zeros_like(padding)}
    masks["question"][0, 36:43], masks["question"][1, 30:33], masks["target"][:, 12:20] = True, True, True
    q = [torch.randn(2, n, 4, 16, generator=generator).transpose(1, 2).to(DEVICE) for _ in range(3)]
    k = [torch.randn(2, n, 2, 16, generator=generator).transpose(1, 2).to(DEVICE) for _ in range(3)]
    mask = [MaskRows(2, n, n, DEVICE, causal=True, padding=~padding.to(DEVICE))] * 3
    if stream:
        mask[1] = mask[1].streamed(StreamingHeads((2,), 4, 3, 6))

    def view(how, rows=q):
        return AttentionView(range(3), rows, k, mask, [0.3] * 3, masks.__getitem__, 3, implementation=how)

    monkeypatch.setattr("hooked_mllm.kernels.attention_profile.launch.settings_for", lambda *_: SMALL)
    torch_view, kernel_view = view("torch"), view("triton")
    selection = torch_view._selections.queries("question")
    kept = {"question": [selection.take(x, slice(0, 7)) for x in q]}
    for found in (kernel_view, view("triton", kept)):
        assert torch.allclose(found.profile("question"), torch_view.profile("question"), atol=1e-6)
        assert torch.allclose(found.mass("question", "target"), torch_view.mass("question", "target"), atol=1e-6)
        found.release()
        found.check()
    q[2][1, 3, 32] = torch.nan  # a question token of the second sample
    spoilt = view("triton")
    spoilt.profile("question")
    spoilt.release()
    with pytest.raises(NumericsError, match=r"first at L2H[23] \(sample 1\)"):
        spoilt.check()
    with pytest.raises(HookValueError, match="causal masks"):
        mask[0] = MaskRows(2, n, n, DEVICE, causal=True, window=4)
        view("triton")

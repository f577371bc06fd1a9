"""Hybrid attention as compiled for a GPU: a grid of shapes against float64, and errors against cuDNN's own.

Uninitialized memory is NaN in all of these.
"""

import os
from itertools import cycle

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.kernels.hybrid_attention import dispatch, hybrid_attention, naive_hybrid_attention, op

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by torch's deterministic mode, which the fixture sets
BFLOAT16_ERROR, FLOAT16_ERROR, FLOAT32_ERROR = 6e-3, 1e-3, 3e-6
TOLERANCE = {torch.bfloat16: BFLOAT16_ERROR, torch.float16: FLOAT16_ERROR, torch.float32: FLOAT32_ERROR}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(batch, heads, kv, q_length, kv_length, d, dtype=torch.bfloat16, seed=0):
    """q, k, v with the strides of transformers: `[batch head pos d]`, views of `[batch pos head d]`."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shapes = ((q_length, heads), (kv_length, kv), (kv_length, kv))
    return [
        torch.randn(batch, n, h, d, generator=generator, device="cuda").to(dtype).transpose(1, 2) for n, h in shapes
    ]


def exact(q, k, v, dense, sink, window, scale=None, start=None, end=None):
    """The definition in float64."""
    flags = torch.zeros(q.shape[1], dtype=torch.bool, device="cuda")
    flags[list(dense)] = True
    start = torch.zeros(len(q), dtype=torch.int32, device="cuda") if start is None else start
    end = torch.full((len(q),), k.shape[2], dtype=torch.int32, device="cuda") if end is None else end
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return naive_hybrid_attention(q.double(), k.double(), v.double(), flags, sink, window, scale, start, end)


def error(x, expected):
    return ((x.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


LENGTHS = [(1, 1), (63, 63), (65, 65), (1000, 1000), (1023, 1023), (1, 1000), (65, 1023), (1023, 65)]
MASKS = cycle([(64, 256), (0, 1), (40, 8), (64, 5000), (128, 100), (2000, 30), (0, 300)])
GRID = [(q, k, group, *next(MASKS)) for q, k in LENGTHS for group in (1, 2, 4, 7, 8)]


@pytest.mark.parametrize(("rows", "length", "group", "sink", "window"), GRID)
def test_lengths_groups_and_masks(rows, length, group, sink, window):
    heads = 2 * group
    q, k, v = tensors(2, heads, 2, rows, length, 128)
    start = torch.tensor([0, length // 3], dtype=torch.int32, device="cuda")
    end = torch.tensor([length - length // 5, length], dtype=torch.int32, device="cuda")
    for dense in ((), (0,), tuple(range(heads))):
        for given in ({}, {"start": start, "end": end}):
            expected, expected_lse = exact(q, k, v, dense, sink, window, **given)
            z, lse = hybrid_attention(q, k, v, dense, sink=sink, window=window, return_lse=True, **given)
            assert error(z, expected) < BFLOAT16_ERROR
            assert torch.equal(lse.isinf(), expected_lse.isinf()) and (z[lse.isinf()] == 0).all()
            assert torch.allclose(lse.double(), expected_lse, atol=1e-4)
            alone = hybrid_attention(q, k, v, dense, sink=sink, window=window, **given)
            assert error(alone, expected) < BFLOAT16_ERROR  # without the log-sum-exp, by SDPA if all are dense


@pytest.mark.parametrize("d", [16, 40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_head_dims_and_dtypes(d, dtype):
    q, k, v = tensors(1, 8, 2, 1023, 1023, d, dtype)
    for dense in ((), (0, 5)):
        expected, _ = exact(q, k, v, dense, 64, 256)
        z = hybrid_attention(q, k, v, dense, window=256)
        assert z.dtype == dtype and error(z, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1000, 1023, 2048])
def test_errors_are_no_larger_than_cudnns(d, dtype, length):
    """The rule: relative error against float64 within 5 percent of cuDNN's on the same inputs.

    cuDNN supports the causal mask; every kernel here has it if all heads are dense or the window contains all keys.
    """
    q, k, v = tensors(1, 8, 2, length, length, d, dtype)
    expected, _ = exact(q, k, v, range(8), 0, 1)
    torch.use_deterministic_algorithms(False)  # torch keeps cuDNN's attention out of that mode
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        cudnn_error = error(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), expected)
    for dense in (range(8), (), (0, 5, 6)):
        z = hybrid_attention(q, k, v, dense, window=length, implementation="triton")
        assert error(z, expected) <= 1.05 * cudnn_error


@pytest.mark.parametrize("dense", [(), (0, 3), tuple(range(8))])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_extreme_scores(dense, dtype):
    q, k, v = tensors(1, 8, 2, 700, 700, 128, dtype)
    q, k = (x * 100 / x.float().norm(dim=-1, keepdim=True).to(dtype) for x in (q, k))
    k[:, :, 5] = q[:, ::4, 5]  # q . k up to 1e4
    expected, expected_lse = exact(q, k, v, dense, 64, 200, 1.0)
    z, lse = hybrid_attention(q, k, v, dense, window=200, scale=1.0, return_lse=True)
    assert z.isfinite().all() and lse.isfinite().all()
    assert (q.double() @ k.double().repeat_interleave(4, dim=1).mT).abs().max() > 9e3
    assert torch.allclose(lse.double(), expected_lse, rtol=1e-5)
    # a float32 score of 1e4 has 3 decimal places
    assert error(z, expected) < (1e-2 if dtype == torch.float32 else 2e-2)


def test_one_visible_key_and_none():
    q, k, v = tensors(2, 8, 2, 300, 300, 128)
    z = hybrid_attention(q, k, v, (), sink=0, window=1)
    assert torch.equal(z, v.repeat_interleave(4, dim=1))
    start, end = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 300], [300, 300]))
    for dense in ((), (1,), tuple(range(8))):
        z, lse = hybrid_attention(q, k, v, dense, window=50, start=start, end=end, return_lse=True)
        assert (z[1] == 0).all() and (lse[1] == -torch.inf).all() and z.isfinite().all()


@pytest.mark.parametrize("dense", [(), (0, 3, 9), tuple(range(16))])
def test_every_run_gives_the_same_bits(dense):
    q, k, v = tensors(1, 16, 4, 4097, 4097, 128)
    first = hybrid_attention(q, k, v, dense)
    assert all(torch.equal(first, hybrid_attention(q, k, v, dense)) for _ in range(5))


def test_tensors_that_no_descriptor_can_represent_are_read_too():
    q, k, v = tensors(1, 8, 2, 300, 300, 128)
    shifted = torch.zeros(k.numel() + 1, device="cuda", dtype=k.dtype)[1:].view(1, 300, 2, 128).transpose(1, 2)
    shifted.copy_(k)
    sparse = torch.zeros(1, 2, 300, 256, device="cuda", dtype=k.dtype)[..., ::2].copy_(k)
    for dense in ((), (1,)):
        expected, _ = exact(q, k, v, dense, 64, 100)
        for keys in (shifted, sparse):
            assert error(hybrid_attention(q, keys, v, dense, window=100), expected) < BFLOAT16_ERROR
        alike = hybrid_attention(q, k[:, :1].expand(-1, 2, -1, -1), v, dense, window=100)  # a stride of 0
        assert error(alike, exact(q, k[:, :1].expand(-1, 2, -1, -1), v, dense, 64, 100)[0]) < BFLOAT16_ERROR


def test_places_past_two_to_the_31st():
    rows = torch.zeros(70000, 32768, device="cuda", dtype=torch.bfloat16)  # a cache with wide rows
    q, k, v = tensors(1, 4, 1, 64, 70000, 128)
    keys, values = (rows[None, :, i : i + 128].unsqueeze(1) for i in (0, 128))
    keys.copy_(k), values.copy_(v)
    for dense in ((), (0,)):
        expected = exact(q, k, v, dense, 64, 1024)[0]
        assert error(hybrid_attention(q, keys, values, dense), expected) < BFLOAT16_ERROR
    odd = rows.view(-1)[1 : 1 + 69999 * 32768].view(69999, 32768)[None, :, :128].unsqueeze(1)  # no descriptor
    odd.copy_(k[:, :, :69999])
    expected = exact(q, k[:, :, :69999], v[:, :, :69999], (0,), 64, 1024)[0]
    assert error(hybrid_attention(q, odd, v[:, :, :69999], (0,)), expected) < BFLOAT16_ERROR


def test_dense_heads_by_sdpa_where_it_is_faster(monkeypatch):
    sent = []

    def spy(q, *rest, **more):
        sent.append(q.shape[1])
        return scaled_dot_product_attention(q, *rest, **more)

    monkeypatch.setattr(dispatch, "scaled_dot_product_attention", spy)
    everything = tuple(range(8))
    q, k, v = tensors(1, 8, 2, 1000, 1000, 128)
    for least, dense in ((24576, everything), (1, (0, 1, 5)), (1, everything), (1, (2, 4, 5, 6, 7)), (1, ())):
        monkeypatch.setattr(op, "SDPA_FROM", least)
        z = hybrid_attention(q, k, v, dense, window=200)
        assert error(z, exact(q, k, v, dense, 64, 200)[0]) < BFLOAT16_ERROR
        assert z.transpose(1, 2).is_contiguous()
    assert sent == [8, 2, 1, 8, 1, 4]  # heads of each call: neighbours that share keys go together
    monkeypatch.setattr(op, "SDPA_FROM", 24576)
    hybrid_attention(q, k, v, (0, 1))
    hybrid_attention(q, k, v, everything, return_lse=True)
    hybrid_attention(q[:, :, 500:], k, v, everything)
    hybrid_attention(q.float(), k.float(), v.float(), everything)
    assert len(sent) == 6  # short with few dense heads, with a log-sum-exp, a chunk, or float32: one launch


def test_what_comes_before_and_after_waits_for_the_dense_heads(monkeypatch):
    """They run on separate streams; the inputs are written just before and overwritten just after."""
    monkeypatch.setattr(op, "SDPA_FROM", 1)
    made = tensors(1, 16, 4, 4096, 4096, 128)
    expected = exact(*made, (0, 5, 6, 10, 15), 64, 1024)[0]
    inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in made]
    side_stream = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side_stream):
        with torch.cuda.stream(stream):
            for _ in range(3):
                for x, y in zip(inputs, made, strict=True):
                    x.copy_(y)
                z = hybrid_attention(*inputs, (0, 5, 6, 10, 15))
                for x in inputs:
                    x.fill_(float("nan"))
                assert error(z, expected) < BFLOAT16_ERROR


def test_an_error_alongside_the_dense_heads_leaves_nothing_running(monkeypatch):
    q, k, v = tensors(1, 8, 2, 4096, 4096, 128)
    monkeypatch.setattr(dispatch, "launch", lambda *_: 1 / 0)
    monkeypatch.setattr(dispatch, "launch_streaming", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dispatch.triton_hybrid_attention(q, k, v, (0, 5), 64, 1024, 0.1, sdpa=True)
    torch.cuda.current_stream().synchronize()
    assert all(stream.query() for stream in dispatch._streams(q.device))


@pytest.mark.parametrize("gpu", range(torch.cuda.device_count()))
def test_on_every_gpu_whichever_is_the_current_one(gpu, monkeypatch):
    q, k, v = tensors(1, 8, 2, 500, 500, 128)
    assert torch.cuda.current_device() == 0
    there = [x.to(f"cuda:{gpu}") for x in (q, k, v)]
    padding = [torch.tensor([n], dtype=torch.int32, device=f"cuda:{gpu}") for n in (3, 490)]
    for least, dense in ((24576, ()), (24576, (1, 2)), (1, (1, 2, 5)), (1, tuple(range(8)))):
        monkeypatch.setattr(op, "SDPA_FROM", least)
        z = hybrid_attention(*there, dense, window=100)
        assert z.device.index == gpu and torch.equal(z.to("cuda:0"), hybrid_attention(q, k, v, dense, window=100))
        padded = hybrid_attention(*there, dense, window=100, start=padding[0], end=padding[1])
        expected = hybrid_attention(
            q, k, v, dense, window=100, start=padding[0].to(q.device), end=padding[1].to(q.device)
        )
        assert torch.equal(padded.to("cuda:0"), expected)


@pytest.mark.parametrize("least", [1, 24576])
@pytest.mark.parametrize("dense", [(), (1,), (0, 2, 5), tuple(range(8))])
def test_in_a_cuda_graph(dense, least, monkeypatch):
    monkeypatch.setattr(op, "SDPA_FROM", least)
    q, k, v = tensors(1, 8, 2, 500, 500, 64)
    eager = hybrid_attention(q, k, v, dense, window=100)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = hybrid_attention(q, k, v, dense, window=100)
    q.copy_(-q)
    z.fill_(float("nan"))
    graph.replay()
    assert torch.equal(z, hybrid_attention(q, k, v, dense, window=100)) and not torch.equal(z, eager)


@pytest.mark.filterwarnings("default")  # of torch's own, while it compiles
def test_compiled_by_inductor():
    q, k, v = tensors(1, 8, 2, 500, 500, 64)

    def run(q, k, v):
        return hybrid_attention(q * 2, k, v, [1, 6], window=100).transpose(1, 2).flatten(2) + 1

    compiled = torch.compile(run, fullgraph=True)
    assert error(compiled(q, k, v), run(q, k, v).double()) < 1e-3
    with torch.inference_mode():
        assert error(compiled(q, k, v), run(q, k, v).double()) < 1e-3


def test_gradients_are_those_of_the_definition():
    q, k, v = (x.detach().requires_grad_(True) for x in tensors(1, 4, 2, 200, 200, 64, torch.float32))
    weights = torch.randn(1, 4, 200, 64, device="cuda")
    z = hybrid_attention(q, k, v, [1], sink=4, window=50)
    found = torch.autograd.grad((z * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((exact(q, k, v, [1], 4, 50)[0] * weights).sum(), (q, k, v))
    assert all(error(x, y.double()) < 1e-5 for x, y in zip(found, expected, strict=True))


def test_other_devices_and_dtypes_fall_back_with_a_notice(recwarn, monkeypatch):
    monkeypatch.setattr(op, "_noticed", set())
    q, k, v = tensors(1, 4, 2, 50, 50, 8)
    for x in ((q, k, v), (q.double(), k.double(), v.double())):
        assert error(hybrid_attention(*x, [0], window=9), exact(q, k, v, [0], 64, 9)[0]) < BFLOAT16_ERROR
    assert sum("torch definition" in str(w.message) for w in recwarn.list) == 2

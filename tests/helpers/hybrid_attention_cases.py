"""Hybrid attention: the definition against NumPy, the kernel against the definition, the op against torch's rules.

On a machine without a GPU the kernel runs under Triton's interpreter.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.triton_interpreter import DEVICE, DTYPES, GPU
from hooked_mllm.errors import HeadError, HookValueError, InputError
from hooked_mllm.kernels.hybrid_attention import hybrid_attention, naive_hybrid_attention, op
from hooked_mllm.kernels.hybrid_attention import triton as triton_kernels
from hooked_mllm.kernels.hybrid_attention.dispatch import triton_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.naive import naive_gradients
from hooked_mllm.kernels.hybrid_attention.plan import plan
from hooked_mllm.kernels.hybrid_attention.streaming import launch_streaming
from hooked_mllm.kernels.hybrid_attention.triton import launch

#: small tiles, so that short sequences have many; the interpreter takes no register limit
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2, "maxnreg": None}


def tensors(batch, heads, kv, q_length, kv_length, d, dtype=torch.float32, seed=0):
    """q, k, v as transformers hands them over: `[batch head pos d]`, views of `[batch pos head d]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((q_length, heads), (kv_length, kv), (kv_length, kv))
    made = [torch.randn(batch, n, h, d, generator=generator).to(DEVICE, dtype) for n, h in shapes]
    return [x.transpose(1, 2) for x in made]


def in_numpy(q, k, v, dense, sink, window, scale, start, end):
    """The definition again, a loop over rows in float64."""
    q, k, v = (x.detach().double().cpu().numpy() for x in (q, k, v))
    batch, heads, rows, _ = q.shape
    length, groups = k.shape[2], heads // k.shape[1]
    z, lse = np.zeros_like(q), np.full((batch, heads, rows), -np.inf)
    for b, h, i in np.ndindex(batch, heads, rows):
        place = i + length - rows
        keys = [
            j
            for j in range(start[b], min(end[b], place + 1))
            if h in dense or j < start[b] + sink or j > place - window
        ]
        if keys:
            scores = k[b, h // groups, keys] @ q[b, h, i] * scale
            lse[b, h, i] = np.logaddexp.reduce(scores)
            z[b, h, i] = np.exp(scores - lse[b, h, i]) @ v[b, h // groups, keys]
    return torch.from_numpy(z), torch.from_numpy(lse)


def bounds(length, padded):
    """First and last keys of two sequences, one padded on the right, the other on the left."""
    start = torch.tensor([0, length // 3], dtype=torch.int32, device=DEVICE)
    end = torch.tensor([length - length // 5, length], dtype=torch.int32, device=DEVICE)
    return (start, end) if padded else (torch.zeros_like(start), torch.full_like(end, length))


def flags(dense, heads):
    found = torch.zeros(heads, dtype=torch.bool, device=DEVICE)
    found[list(dense)] = True
    return found


@settings(max_examples=20, deadline=None)
@given(
    q_length=st.integers(1, 9),
    more=st.integers(-3, 7),
    sink=st.integers(0, 6),
    window=st.integers(1, 8),
    dense=st.sets(st.integers(0, 3)),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    chunk=st.integers(1, 5),
)
def test_the_definition_against_numpy(q_length, more, sink, window, dense, left, right, chunk):
    length = max(1, q_length + more)
    q, k, v = (x.cpu().double() for x in tensors(2, 4, 2, q_length, length, 4))
    start, end = torch.tensor([0, left]), torch.tensor([length, length - right])
    z, lse = naive_hybrid_attention(q, k, v, flags(dense, 4).cpu(), sink, window, 0.5, start, end, chunk)
    want, want_lse = in_numpy(q, k, v, dense, sink, window, 0.5, start.tolist(), end.tolist())
    assert torch.allclose(z, want, atol=1e-12)
    assert torch.allclose(lse, want_lse, atol=1e-12)


#: queries, keys, sink, window, dense heads, heads, key-value heads
CASES = {
    "one row": (1, 1, 4, 16, (0,), 4, 1),
    "odd": (63, 63, 4, 16, (0, 3), 4, 2),
    "one more than a tile": (65, 65, 0, 1, (1,), 4, 2),
    "window beyond the sequence": (70, 70, 3, 500, (), 4, 1),
    "sink beyond the window": (77, 77, 40, 8, (2,), 4, 4),
    "sink beyond the sequence": (40, 40, 100, 4, (), 4, 2),
    "all dense": (66, 66, 4, 8, (0, 1, 2, 3, 4, 5), 6, 2),
    "a chunk against its cache": (33, 100, 5, 20, (1, 4), 6, 3),
    "a single query": (1, 77, 4, 9, (3,), 6, 2),
    "more queries than keys": (70, 50, 4, 16, (0,), 4, 2),
    "one key-value head": (50, 50, 4, 16, (1, 2), 4, 1),
    "groups of seven": (45, 45, 4, 16, (2, 9), 14, 2),
    "groups of eight": (45, 45, 4, 16, (2, 9), 16, 2),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel_against_the_definition(case, padded):
    rows, length, sink, window, dense, heads, kv = CASES[case]
    q, k, v = tensors(2, heads, kv, rows, length, 16)
    start, end = bounds(length, padded)
    want, want_lse = naive_hybrid_attention(q, k, v, flags(dense, heads), sink, window, 0.3, start, end)
    given = (start, end) if padded else (None, None)
    z, lse = triton_hybrid_attention(q, k, v, dense, sink, window, 0.3, *given, True, config=SMALL)
    assert torch.allclose(z, want, atol=2e-6)
    assert torch.allclose(lse, want_lse, atol=2e-6)


#: queries, keys, sink, window, heads, key-value heads: of a group, all stream
STREAMING = {
    "one row": (1, 1, 4, 16, 4, 1),
    "odd, a sink of one block": (63, 63, 16, 16, 4, 1),
    "a sink of two blocks": (65, 65, 32, 7, 4, 2),
    "no sink": (50, 50, 0, 1, 2, 1),
    "window beyond the sequence": (70, 70, 3, 500, 4, 4),
    "sink beyond the window": (77, 77, 40, 8, 8, 1),
    "a chunk against its cache": (33, 100, 16, 20, 8, 2),
    "more queries than keys": (70, 50, 32, 20, 4, 2),
}


@pytest.mark.parametrize("case", STREAMING)
@pytest.mark.parametrize("padded", [False, True])
def test_the_streaming_kernel_against_the_definition(case, padded):
    rows, length, sink, window, heads, kv = STREAMING[case]
    dtype = torch.float16 if GPU else torch.float32  # descriptors of a GPU need more than a few bytes in a row
    q, k, v = tensors(2, heads, kv, rows, length, 64 if GPU else 16, dtype)
    start, end = bounds(length, padded)
    want, want_lse = naive_hybrid_attention(q, k, v, flags((), heads), sink, window, 0.3, start, end)
    around = torch.full((2, rows, heads + 2, q.shape[-1]), float("nan"), device=DEVICE, dtype=dtype)
    out = around[:, :, 1:-1].transpose(1, 2)
    lse = torch.full(want_lse.shape, float("nan"), device=DEVICE)
    rows_of = plan((), heads, kv, q.device).rows
    given = (start, end) if padded else (None, None)
    launch_streaming(q, k, v, out, lse, rows_of, sink, window, 0.3, *given, SMALL)
    assert torch.allclose(out.float(), want.float(), atol=3e-3 if GPU else 2e-6)
    assert torch.allclose(lse, want_lse, atol=2e-4 if GPU else 2e-6)
    assert around[:, :, 0].isnan().all() and around[:, :, -1].isnan().all()


def test_some_groups_of_a_layer_by_the_streaming_kernel():
    """What long prompts get on a GPU: dense heads elsewhere, whole groups here, the rest by the kernel for all."""
    q, k, v = tensors(1, 8, 4, 40, 40, 64 if GPU else 16, torch.float16 if GPU else torch.float32)
    groups = plan((2, 6, 7), 8, 4, q.device)
    assert (groups.n_dense, groups.n_whole, groups.n_streaming) == (2, 2, 3)
    out = torch.full((1, 40, 8, q.shape[-1]), float("nan"), device=DEVICE, dtype=q.dtype).transpose(1, 2)
    whole = groups.rows[groups.n_dense : groups.n_dense + groups.n_whole]
    launch_streaming(q, k, v, out, None, whole, 16, 9, 0.3, None, None, SMALL)
    bounds_of = torch.zeros(1, device=DEVICE), torch.full((1,), 40, device=DEVICE)
    want, _ = naive_hybrid_attention(q, k, v, flags((), 8), 16, 9, 0.3, *bounds_of)
    assert out[:, [2, 3, 6, 7]].isnan().all()  # groups 1 and 3 have dense heads
    assert torch.allclose(out[:, [0, 1, 4, 5]].float(), want[:, [0, 1, 4, 5]].float(), atol=3e-3 if GPU else 2e-6)


@pytest.mark.parametrize("dense", [(), (0, 1, 5), (2, 4, 5, 6, 7), (4, 5, 6, 7), tuple(range(8))])
def test_dense_heads_by_sdpa_and_the_rest_by_a_kernel(dense):
    dtype = torch.float16 if GPU else torch.float32
    q, k, v = tensors(1, 8, 2, 45, 45, 64 if GPU else 16, dtype)
    both = torch.zeros(1, device=DEVICE), torch.full((1,), 45, device=DEVICE)
    want, want_lse = naive_hybrid_attention(q, k, v, flags(dense, 8), 4, 9, 0.3, *both)
    z, none = triton_hybrid_attention(q, k, v, dense, 4, 9, 0.3, sdpa=True, config=SMALL)
    assert none is None and z.transpose(1, 2).is_contiguous()
    assert torch.allclose(z.float(), want.float(), atol=3e-3 if GPU else 2e-6)
    if len(dense) == 3:  # what SDPA cannot do is not asked of it
        _, lse = triton_hybrid_attention(q, k, v, dense, 4, 9, 0.3, with_lse=True, sdpa=True, config=SMALL)
        assert torch.allclose(lse, want_lse, atol=2e-4 if GPU else 2e-6)


@pytest.mark.parametrize("d", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims_and_dtypes(d, dtype):
    length = 300 if GPU else 24
    q, k, v = tensors(1, 2, 1, length, length, d, dtype)
    both = torch.zeros(1, device=DEVICE), torch.full((1,), length, device=DEVICE)
    want, _ = naive_hybrid_attention(q.double(), k.double(), v.double(), flags((1,), 2), 5, 20, d**-0.5, *both)
    config = None if GPU else SMALL
    z, _ = triton_hybrid_attention(q, k, v, (1,), 5, 20, d**-0.5, config=config)
    assert z.dtype == dtype
    error = ((z.double() - want).norm() / want.norm()).item()
    assert error < {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]


def test_every_place_of_the_result_is_written_and_nothing_else():
    q, k, v = tensors(2, 6, 3, 45, 45, 16)
    around = torch.full((2, 45, 8, 16), float("nan"), device=DEVICE)
    out = around[:, :, 1:7].transpose(1, 2)
    lse = torch.full((2, 6, 45), float("nan"), device=DEVICE)
    launch(q, k, v, out, lse, plan((0, 4), 6, 3, q.device), 4, 8, 0.25, None, None, SMALL)
    assert not out.isnan().any() and not lse.isnan().any()
    assert around[:, :, 0].isnan().all() and around[:, :, 7].isnan().all()


@pytest.mark.parametrize("dense", [(0,), ()])
def test_extreme_scores_and_rows_that_see_nothing(dense):
    q, k, v = tensors(2, 4, 2, 40, 40, 16)
    q = q * 100 / q.norm(dim=-1, keepdim=True)
    k = k * 100 / k.norm(dim=-1, keepdim=True)  # q . k up to 1e4
    start = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)  # the second sequence is padding
    end = torch.tensor([40, 40], dtype=torch.int32, device=DEVICE)
    want, want_lse = naive_hybrid_attention(q, k, v, flags(dense, 4), 4, 8, 1.0, start, end)
    z, lse = triton_hybrid_attention(q, k, v, dense, 4, 8, 1.0, start, end, True, config=SMALL)
    assert torch.allclose(z, want, atol=2e-3 if GPU else 1e-4) and torch.isfinite(z).all()
    assert (z[1] == 0).all() and (lse[1] == -torch.inf).all()
    assert torch.allclose(lse[0], want_lse[0], rtol=1e-5)


def test_rows_with_one_visible_key_are_its_value():
    q, k, v = tensors(1, 4, 2, 36, 36, 16)
    z, lse = triton_hybrid_attention(q * 1e3, k, v, (), 0, 1, 1.0, None, None, True, config=SMALL)
    # compiled, a product and a difference are fused: the weight of the one key is 1 but for rounding, and divided out
    assert torch.allclose(z, v.repeat_interleave(2, dim=1), rtol=3e-7 if GPU else 0, atol=0)
    assert torch.allclose(lse, (q * 1e3 * k.repeat_interleave(2, dim=1)).sum(-1), rtol=1e-5, atol=1e-3)


def test_inputs_strided_in_any_way_are_read_in_place():
    q, k, v = tensors(1, 4, 2, 30, 30, 16)
    wide = torch.randn(1, 30, 8, 32, device=DEVICE)  # queries, keys and values as one projection makes them
    wide[:, :, :4, ::2], wide[:, :, 4:6, ::2], wide[:, :, 6:, ::2] = (x.transpose(1, 2) for x in (q, k, v))
    views = [wide[:, :, part, ::2].transpose(1, 2) for part in (slice(4), slice(4, 6), slice(6, 8))]
    shared = k[:, :1].expand(-1, 2, -1, -1)  # a stride of 0
    for there, same in ((views, (q, k, v)), ((q, shared, v), (q, shared.contiguous(), v))):
        z, _ = triton_hybrid_attention(*there, (1,), 4, 8, 0.25, config=SMALL)
        assert torch.equal(z, triton_hybrid_attention(*same, (1,), 4, 8, 0.25, config=SMALL)[0])


def test_the_same_twice():
    q, k, v = tensors(1, 4, 2, 90, 90, 16, torch.float16)
    for dense in ((1,), ()):
        first, again = (triton_hybrid_attention(q, k, v, dense, 4, 16, 0.25, config=SMALL)[0] for _ in range(2))
        assert torch.equal(first, again)


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("how", ["naive", *(["triton", "sdpa"] if GPU else [])])
def test_the_op_keeps_torchs_rules(with_lse, how):
    q, k, v = tensors(1, 4, 2, 24, 24, 16)
    padding = torch.tensor([3], device=DEVICE)
    for start in (None, padding):
        arguments = (q, k, v, [0, 3], 4, 8, 0.25, start, None, with_lse, how)
        torch.library.opcheck(
            torch.ops.hooked_mllm.hybrid_attention, arguments, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
@pytest.mark.parametrize("dense", [[0, 3], [], [0, 1, 2, 3]])
def test_compiled_and_in_inference_mode(dense):
    q, k, v = tensors(1, 4, 2, 24, 24, 64, torch.float16)

    def run(*x):
        return hybrid_attention(*x, dense, sink=4, window=8, return_lse=True)

    z, lse = run(q, k, v)
    assert z.transpose(1, 2).is_contiguous() and lse.dtype == torch.float32
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.inference_mode():
        inference = run(q, k, v)
    for again in (compiled(q, k, v), inference):
        assert torch.equal(again[0], z) and torch.equal(again[1], lse)


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
def test_the_first_call_may_be_a_compiled_one(monkeypatch):
    monkeypatch.setattr(op, "_noticed", set())
    torch._dynamo.reset()
    q, k, v = tensors(1, 4, 2, 24, 24, 64, torch.float16)
    run = torch.compile(lambda *x: hybrid_attention(*x, [0], sink=4, window=8), fullgraph=True, backend="eager")
    assert torch.equal(run(q, k, v), hybrid_attention(q, k, v, [0], sink=4, window=8))


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
def test_under_autocast_it_takes_what_sdpa_takes():
    q, k, v = tensors(1, 4, 2, 24, 24, 64)
    mixed = q, k, v.bfloat16()
    want = hybrid_attention(*(x.bfloat16() for x in mixed), [0], window=8)
    with pytest.raises(InputError, match="one dtype"):
        hybrid_attention(*mixed, [0], window=8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(hybrid_attention(*mixed, [0], window=8), want)


@pytest.mark.parametrize("how", ["naive", "triton"])
@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
def test_bounds_beyond_the_keys_and_numbers_beyond_32_bits(how, monkeypatch):
    """The padding of a whole prompt may be given for the part that was read; a window may be as long as can be."""
    monkeypatch.setattr(triton_kernels, "settings_for", lambda *_: SMALL)
    made = tensors(1, 4, 2, 40, 40, 16)
    room = torch.full((3, 1, 4, 80, 16), torch.nan, device=DEVICE)
    for x, own in zip(made, room, strict=True):
        own[:, : x.shape[1], :40] = x
    q, k, v = (own[:, : x.shape[1], :40] for x, own in zip(made, room, strict=True))
    run = torch.ops.hooked_mllm.hybrid_attention

    def bounds(start, end):
        return torch.tensor([start], device=DEVICE), torch.tensor([end], device=DEVICE)

    close = {"atol": 2e-6, "rtol": 0}
    want = naive_hybrid_attention(*made, flags([1], 4), 4, 8, 0.25, *bounds(0, 40))[0]
    for padding in (bounds(0, 40), bounds(0, 70), bounds(-9, 70)):
        torch.testing.assert_close(run(q, k, v, [1], 4, 8, 0.25, *padding, False, how)[0], want, **close)
    causal = naive_hybrid_attention(*made, flags(range(4), 4), 0, 1, 0.25, *bounds(0, 40))[0]
    for sink, window in ((2**62, 1), (2**31 - 1, 8), (0, 2**63 - 1)):
        torch.testing.assert_close(run(q, k, v, [1], sink, window, 0.25, None, None, False, how)[0], causal, **close)


def test_gradients_in_pieces_are_those_of_autograd():
    q, k, v = (x.cpu().double().requires_grad_(True) for x in tensors(2, 4, 2, 11, 14, 5))
    start, end = torch.tensor([0, 6]), torch.tensor([14, 9])
    how = (torch.tensor([True, False, False, True]), 2, 3, 0.4, start, end)
    z, lse = naive_hybrid_attention(q, k, v, *how)
    seen = lse.isfinite()
    dz, dlse = torch.randn_like(z), torch.randn_like(lse) * seen
    want = torch.autograd.grad([z, lse[seen]], (q, k, v), [dz, dlse[seen]])
    for chunk in (1, 4, 100):
        found = naive_gradients(q.detach(), k.detach(), v.detach(), *how, dz, dlse, chunk=chunk)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
def test_gradients():
    q, k, v = (x.cpu().double().requires_grad_(True) for x in tensors(2, 2, 1, 7, 9, 3))
    start, end = torch.tensor([0, 2]), torch.tensor([9, 4])  # rows of the second sequence that see nothing

    def run(*x):
        z, lse = hybrid_attention(*x, [1], sink=1, window=3, start=start, end=end, return_lse=True)
        return z, torch.where(lse.isinf(), 0.0, lse)

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_bad_input():
    q, k, v = tensors(1, 4, 2, 8, 8, 16)
    with pytest.raises(HeadError, match="0 to 3"):
        hybrid_attention(q, k, v, [4])
    for flags_or_worse in ([True, False], torch.ones(4, dtype=torch.bool), [0.0], torch.zeros(1), ["L0H1"], 3, None):
        with pytest.raises(HeadError, match=r"Expected numbers of query heads from 0 to 3.*mask\.nonzero"):
            hybrid_attention(q, k, v, flags_or_worse)
    for scale in (0.0, -1.0, float("inf")):
        with pytest.raises(InputError, match="above 0"):
            hybrid_attention(q, k, v, [0], scale=scale)
    with pytest.raises(InputError, match="kv_head"):
        hybrid_attention(q[0], k, v, [0])
    with pytest.raises(InputError, match="divide"):
        hybrid_attention(q[:, :3], k, v, [0])
    with pytest.raises(InputError, match="window"):
        hybrid_attention(q, k, v, [0], window=0)
    with pytest.raises(InputError, match="dtype"):
        hybrid_attention(q, k.double(), v.double(), [0])
    with pytest.raises(InputError, match="start"):
        hybrid_attention(q, k, v, [0], start=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(InputError, match="integers"):
        hybrid_attention(q, k, v, [0], start=torch.zeros(1))
    with pytest.raises(InputError, match="floating-point"):
        hybrid_attention(q.long(), k.long(), v.long(), [0])
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="scale"):
            hybrid_attention(q, k, v, [0], scale=scale)
    with pytest.raises(HookValueError, match="implementation"):
        hybrid_attention(q, k, v, [0], implementation="cuda")
    with pytest.raises(HookValueError, match="naive' runs anywhere"):
        hybrid_attention(q.cpu(), k.cpu(), v.cpu(), [0], implementation="triton")
    with pytest.raises(InputError, match="scaled_dot_product_attention"):
        hybrid_attention(q, k, v, [0], causal=False)
    with pytest.raises(HookValueError, match="head dim"):
        hybrid_attention(q[..., :8], k[..., :8], v[..., :8], [0], implementation="triton")


def test_one_notice_that_the_definition_runs(recwarn, monkeypatch):
    monkeypatch.setattr("hooked_mllm.kernels.hybrid_attention.op._noticed", set())
    q, k, v = (x.cpu() for x in tensors(1, 4, 2, 8, 8, 16))
    for _ in range(2):
        hybrid_attention(q, k, v, [0])
    assert sum("torch definition" in str(w.message) for w in recwarn.list) == 1

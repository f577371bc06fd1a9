"""The public op: torch's rules for ops, compiled and in mixed precision, bad input; no type checks before its own."""

import pytest
import torch

from helpers.hybrid_inputs import SMALL, flags, tensors
from helpers.triton_interpreter import DEVICE, GPU
from hooked_mllm.errors import HeadError, HookValueError, InputError
from hooked_mllm.kernels.hybrid_attention import hybrid_attention, naive_hybrid_attention, op
from hooked_mllm.kernels.hybrid_attention import triton as triton_kernels


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


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch 2.11 on a machine with a GPU
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
    expected = hybrid_attention(*(x.bfloat16() for x in mixed), [0], window=8)
    with pytest.raises(InputError, match="one dtype"):
        hybrid_attention(*mixed, [0], window=8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(hybrid_attention(*mixed, [0], window=8), expected)


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
    expected = naive_hybrid_attention(*made, flags([1], 4), 4, 8, 0.25, *bounds(0, 40))[0]
    for padding in (bounds(0, 40), bounds(0, 70), bounds(-9, 70)):
        torch.testing.assert_close(run(q, k, v, [1], 4, 8, 0.25, *padding, False, how)[0], expected, **close)
    causal = naive_hybrid_attention(*made, flags(range(4), 4), 0, 1, 0.25, *bounds(0, 40))[0]
    for sink, window in ((2**62, 1), (2**31 - 1, 8), (0, 2**63 - 1)):
        torch.testing.assert_close(run(q, k, v, [1], sink, window, 0.25, None, None, False, how)[0], causal, **close)


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

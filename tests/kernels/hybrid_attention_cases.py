"""Hybrid attention: the definition against NumPy, the kernel against the definition, the op against torch's rules.

On a machine without a GPU the kernel runs under Triton's interpreter.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from hooked_mllm.errors import HeadError, HookValueError, InputError
from hooked_mllm.kernels.hybrid_attention import hybrid_attention, naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.plan import plan
from hooked_mllm.kernels.hybrid_attention.triton import launch, triton_hybrid_attention

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:  # Triton 3.6's interpreter takes int() of arrays of one number, which NumPy 2.5 refuses
    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *rest):
        _patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor

#: Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
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
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel_against_the_definition(case, padded):
    rows, length, sink, window, dense, heads, kv = CASES[case]
    q, k, v = tensors(2, heads, kv, rows, length, 16)
    start = torch.tensor([0, length // 3], dtype=torch.int32, device=DEVICE)
    end = torch.tensor([length - length // 5, length], dtype=torch.int32, device=DEVICE)
    if not padded:
        start, end = torch.zeros_like(start), torch.full_like(end, length)
    want, want_lse = naive_hybrid_attention(q, k, v, flags(dense, heads), sink, window, 0.3, start, end)
    bounds = (start, end) if padded else (None, None)
    z, lse = triton_hybrid_attention(q, k, v, dense, sink, window, 0.3, *bounds, True, SMALL)
    assert torch.allclose(z, want, atol=2e-6)
    assert torch.allclose(lse, want_lse, atol=2e-6)


@pytest.mark.parametrize("d", [64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims_and_dtypes(d, dtype):
    length = 300 if GPU else 40
    q, k, v = tensors(1, 4, 2, length, length, d, dtype)
    bounds = torch.zeros(1, device=DEVICE), torch.full((1,), length, device=DEVICE)
    want, _ = naive_hybrid_attention(q.double(), k.double(), v.double(), flags((1,), 4), 5, 20, d**-0.5, *bounds)
    config = None if GPU else SMALL
    z, _ = triton_hybrid_attention(q, k, v, (1,), 5, 20, d**-0.5, config=config)
    assert z.dtype == dtype
    error = ((z.double() - want).norm() / want.norm()).item()
    assert error < {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]


def test_every_place_of_the_result_is_written_and_nothing_else():
    q, k, v = tensors(2, 6, 3, 45, 45, 16)
    rows, n_dense, *most = plan((0, 4), 6, 3, q.device)
    around = torch.full((2, 45, 8, 16), float("nan"), device=DEVICE)
    out = around[:, :, 1:7].transpose(1, 2)
    lse = torch.full((2, 6, 45), float("nan"), device=DEVICE)
    launch(q, k, v, out, lse, rows, n_dense, (most[0], most[1]), 4, 8, 0.25, None, None, SMALL)
    assert not out.isnan().any() and not lse.isnan().any()
    assert around[:, :, 0].isnan().all() and around[:, :, 7].isnan().all()


def test_extreme_scores_and_rows_that_see_nothing():
    q, k, v = tensors(2, 4, 2, 40, 40, 16)
    q = q * 100 / q.norm(dim=-1, keepdim=True)
    k = k * 100 / k.norm(dim=-1, keepdim=True)  # q . k up to 1e4
    start = torch.tensor([0, 40], dtype=torch.int32, device=DEVICE)  # the second sequence is padding
    end = torch.tensor([40, 40], dtype=torch.int32, device=DEVICE)
    want, want_lse = naive_hybrid_attention(q, k, v, flags((0,), 4), 4, 8, 1.0, start, end)
    z, lse = triton_hybrid_attention(q, k, v, (0,), 4, 8, 1.0, start, end, True, SMALL)
    assert torch.allclose(z, want, atol=2e-3 if GPU else 1e-4) and torch.isfinite(z).all()
    assert (z[1] == 0).all() and (lse[1] == -torch.inf).all()
    assert torch.allclose(lse[0], want_lse[0], rtol=1e-5)


def test_the_same_twice():
    q, k, v = tensors(1, 4, 2, 90, 90, 16, torch.float16)
    first, again = (triton_hybrid_attention(q, k, v, (1,), 4, 16, 0.25, config=SMALL)[0] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
def test_the_op_keeps_torchs_rules():
    q, k, v = tensors(1, 4, 2, 24, 24, 16)
    arguments = (q, k, v, [0, 3], 4, 8, 0.25, None, None, True, "naive")
    torch.library.opcheck(
        torch.ops.hooked_mllm.hybrid_attention, arguments, test_utils=("test_schema", "test_faketensor")
    )
    z = hybrid_attention(q, k, v, {3, 0}, sink=4, window=8, scale=0.25)
    assert z.transpose(1, 2).is_contiguous()
    compiled = torch.compile(lambda *x: hybrid_attention(*x, [0, 3], sink=4, window=8), fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v), z)
    with torch.inference_mode():
        assert torch.equal(hybrid_attention(q, k, v, [0, 3], sink=4, window=8), z)


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
    with pytest.raises(HookValueError, match="implementation"):
        hybrid_attention(q, k, v, [0], implementation="cuda")
    with pytest.raises(HookValueError, match="head dim"):
        hybrid_attention(q[..., :8], k[..., :8], v[..., :8], [0], implementation="triton")


def test_one_notice_that_the_definition_runs(recwarn, monkeypatch):
    monkeypatch.setattr("hooked_mllm.kernels.hybrid_attention.op._noticed", set())
    q, k, v = (x.cpu() for x in tensors(1, 4, 2, 8, 8, 16))
    for _ in range(2):
        hybrid_attention(q, k, v, [0])
    assert sum("torch definition" in str(w.message) for w in recwarn.list) == 1


@pytest.mark.skipif(not GPU, reason="SDPA's part is for long prompts on a GPU")
def test_long_prompts_on_a_gpu(monkeypatch):
    monkeypatch.setattr("hooked_mllm.kernels.hybrid_attention.op.SDPA_FROM", 1)
    for dense in [(0, 1, 5), tuple(range(8)), (), (4, 5, 6, 7)]:
        q, k, v = tensors(1, 8, 2, 1000, 1000, 128, torch.bfloat16)
        bounds = torch.zeros(1, device=DEVICE), torch.full((1,), 1000, device=DEVICE)
        want, _ = naive_hybrid_attention(
            q.double(), k.double(), v.double(), flags(dense, 8), 64, 200, 128**-0.5, *bounds
        )
        z = hybrid_attention(q, k, v, dense, window=200)
        assert ((z.double() - want).norm() / want.norm()).item() < 5e-3


@pytest.mark.skipif(not GPU, reason="CUDA graphs need a GPU")
def test_in_a_cuda_graph():
    q, k, v = tensors(1, 8, 2, 500, 500, 64, torch.bfloat16)
    eager = hybrid_attention(q, k, v, [1], window=100)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = hybrid_attention(q, k, v, [1], window=100)
    graph.replay()
    assert torch.equal(z, eager)

"""The definition of hybrid attention against NumPy, and its gradients against autograd."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.hybrid_inputs import flags, in_numpy, tensors
from hooked_mllm.kernels.hybrid_attention import naive_hybrid_attention
from hooked_mllm.kernels.hybrid_attention.naive import naive_gradients


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
    expected, expected_lse = in_numpy(q, k, v, dense, sink, window, 0.5, start.tolist(), end.tolist())
    assert torch.allclose(z, expected, atol=1e-12)
    assert torch.allclose(lse, expected_lse, atol=1e-12)


def test_gradients_in_pieces_are_those_of_autograd():
    q, k, v = (x.cpu().double().requires_grad_(True) for x in tensors(2, 4, 2, 11, 14, 5))
    start, end = torch.tensor([0, 6]), torch.tensor([14, 9])
    how = (torch.tensor([True, False, False, True]), 2, 3, 0.4, start, end)
    z, lse = naive_hybrid_attention(q, k, v, *how)
    seen = lse.isfinite()
    dz, dlse = torch.randn_like(z), torch.randn_like(lse) * seen
    expected = torch.autograd.grad([z, lse[seen]], (q, k, v), [dz, dlse[seen]])
    for chunk in (1, 4, 100):
        found = naive_gradients(q.detach(), k.detach(), v.detach(), *how, dz, dlse, chunk=chunk)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)

"""The parts of DuoGate by themselves: mixed attention by loops, Adam by its formulas, the state on disk."""

import numpy as np
import pytest
import torch

from helpers.wrapped import model_inputs, plain, wrapped
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.errors import CacheFileError
from hooked_mllm.metrics.gating import GateState, MixedAttention, last_hidden

SINK, RECENT, SCALE = 2, 3, 0.5


def by_loops(q, k, v, gate, real):
    """Attention of one head [query d], full and near rows mixed, in float64; NaN in rows of padding."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    places = np.flatnonzero(real)
    out = np.full(q.shape, np.nan)
    for n, i in enumerate(places):
        mixed = np.zeros(q.shape[1])
        for share, near in ((gate, False), (1 - gate, True)):
            keys = [j for m, j in enumerate(places[: n + 1]) if not near or m < SINK or n - m < RECENT]
            weights = np.exp(SCALE * k[keys] @ q[i])
            mixed += share * (weights / weights.sum()) @ v[keys]
        out[i] = mixed
    return out


@pytest.mark.parametrize("padded", [False, True])
def test_each_head_is_mixed_by_the_gate_of_its_key_value_head(padded):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=generator)
    k, v = (torch.randn(2, 2, 9, 8, generator=generator) for _ in range(2))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, :3] = padded
    gates = torch.tensor([[0.5, 0.5], [0.0, 0.3]])
    mask = MaskRows(2, 9, 9, "cpu", causal=True, padding=~padding if padded else None)
    mixed = MixedAttention(gates, SINK, RECENT, padding)
    out = mixed(q, k, v, mask, SCALE, layer=1)
    assert out.shape == (2, 9, 4, 8) and mixed.layers == {1}
    for batch, head in np.ndindex(2, 4):
        expected = by_loops(
            q[batch, head], k[batch, head // 2], v[batch, head // 2], gates[1, head // 2].item(), ~padding[batch]
        )
        real = (~padding[batch]).numpy()
        np.testing.assert_allclose(out[batch, real, head], expected[real], atol=1e-5)


def test_gates_of_padded_batches_have_finite_gradients():
    gates = torch.full((1, 1), 0.5, requires_grad=True)
    padding = torch.tensor([[True, True, False, False]])
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    mask = MaskRows(1, 4, 4, "cpu", causal=True, padding=~padding)
    MixedAttention(gates, 1, 1, padding)(q, q, q, mask, SCALE, layer=0)[:, 2:].sum().backward()
    assert gates.grad.isfinite().all() and q.grad.isfinite().all()


@torch.no_grad()
def test_last_hidden_states_are_those_of_the_unwrapped_model(family):
    inputs = model_inputs(family)
    rows = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    rows[0, -3:] = True
    model = wrapped(family)
    expected = plain(family).model(**inputs, use_cache=False).last_hidden_state[rows]
    torch.testing.assert_close(last_hidden(model, model.resolve(inputs), rows), expected)
    assert not model.ln_final._forward_hooks


def adam(gradients, start, lr):
    """Kingma and Ba's update, in NumPy, each step clipped to 0..1."""
    x, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        x = np.clip(x - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), 0, 1)
    return x


def stepped(path, settings, gradients, lr=0.2):
    """A state after one step for each gradient, from gates of 0.9 and 0.5, loaded first."""
    gates = torch.tensor([[0.9, 0.5]], dtype=torch.float64, requires_grad=True)
    state = GateState(path, gates, lr, settings)
    state.load()
    for gradient in gradients:
        state.step((gates * torch.tensor(gradient)).sum(), distance=float(len(state.distances)), lr=lr)
    return state


GRADIENTS = [[1.0, -1.0], [0.5, -3.0], [-0.2, -0.1]]


def test_steps_are_those_of_adam_with_gates_kept_in_range():
    state = stepped(None, {}, GRADIENTS)
    expected = adam([np.array(g) for g in GRADIENTS], np.array([0.9, 0.5]), 0.2)
    np.testing.assert_allclose(state.gates.detach()[0], expected, atol=1e-7)
    assert expected.max() == 1.0 and state.distances == [0.0, 1.0, 2.0]


def test_a_saved_state_continues_as_if_it_had_not_stopped(tmp_path):
    path, settings = tmp_path / "gates.safetensors", {"seed": 3}
    stepped(path, settings, GRADIENTS[:2]).save()
    continued, whole = stepped(path, settings, GRADIENTS[2:]), stepped(None, settings, GRADIENTS)
    assert torch.equal(continued.gates, whole.gates) and continued.distances == whole.distances


def test_a_state_of_other_settings_or_another_shape(tmp_path):
    path = tmp_path / "gates.safetensors"
    stepped(path, {"seed": 3}, GRADIENTS).save()
    with pytest.raises(CacheFileError, match="seed"):
        stepped(path, {"seed": 4}, [])
    other = GateState(path, torch.zeros(2, 2, requires_grad=True), 0.1, {"seed": 3})
    with pytest.raises(CacheFileError, match="model of another shape"):
        other.load()


def test_nothing_is_written_before_the_first_step(tmp_path):
    path = tmp_path / "gates.safetensors"
    stepped(path, {}, []).save()
    assert not path.exists()

"""Steering against a torch hook that adds the direction."""

import pytest
import torch

from helpers.intervention_witness import GREEDY, batch, sample
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm import Steer
from hooked_mllm.errors import HookNameError, HookValueError


@torch.no_grad()
def test_steering_equals_a_torch_hook_that_adds_the_direction(family):
    model, inputs, witness = wrapped(family), batch(family), plain(family)
    direction = torch.linspace(-1, 1, 32)
    rows = inputs.mask("visual")

    def add(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        if x.shape[1] > 1:
            x = torch.where(rows[..., None], x + 2 * direction, x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [witness.model.language_model.layers[l].register_forward_hook(add) for l in (0, LAYERS - 1)]
    expected, tokens = witness(**inputs.inputs).logits, witness.generate(**inputs.inputs, **GREEDY)
    for handle in handles:
        handle.remove()
    steer = Steer(direction, layer=[0, -1], positions="visual", coefficient=2, phase="prefill")
    with model.intervene(steer):
        assert torch.equal(model(inputs), expected)
        assert torch.equal(model.generate(inputs, **GREEDY), tokens)


def test_directions_that_do_not_fit():
    model = wrapped("qwen3_vl")
    with pytest.raises(HookValueError, match="31 numbers"):
        Steer(torch.ones(31), 0).validate(model)
    with pytest.raises(HookValueError, match="vector"):
        Steer(torch.ones(2, 32), 0)
    with pytest.raises(HookValueError, match="not finite"):
        Steer(torch.full((32,), float("nan")), 0)
    with pytest.raises(HookValueError, match="site must be"):
        Steer(torch.ones(32), 0, site="pattern")
    with pytest.raises(HookNameError, match="out of range"):
        Steer(torch.ones(32), 3).validate(model)


def test_gradients_pass_through():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    direction = torch.zeros(32, requires_grad=True)
    with model.intervene(Steer(direction, 1, positions="last", phase="prefill")):
        model(inputs)[0, -1, 5].backward()
    assert direction.grad is not None and direction.grad.abs().max() > 0

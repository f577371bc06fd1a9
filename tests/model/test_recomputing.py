"""Gradient checkpointing: the backward pass computes blocks again, with the hooks of the forward pass or not at all."""

from functools import partial

import pytest
import torch

from helpers.wrapped import fresh, model_inputs
from hooked_mllm import HeadAblation, HookedMLLM
from hooked_mllm.errors import HookValueError

NAME = "blocks.1.attn.hook_z"
FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")


@pytest.fixture(params=[(name, reentrant) for name in FAMILIES for reentrant in (False, True)], ids=str)
def model(request) -> HookedMLLM:
    name, reentrant = request.param
    hooked = HookedMLLM.from_model(fresh(name), check=False)
    hooked.hf_model.train().requires_grad_(True)
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=reentrant)
    hooked.hf_model._set_gradient_checkpointing(True, checkpoint)
    hooked.inputs = model_inputs(name)
    return hooked


def gradient(model: HookedMLLM) -> torch.Tensor:
    return model.wiring.output_projection(model.wiring.text[1]).weight.grad


def zero(z, hook):
    return z * 0


def test_inside_the_with_the_gradients_are_those_of_the_edited_model(model):
    with model.hooks([(NAME, zero)]):
        model(model.inputs).float().sum().backward()
    assert gradient(model).abs().max() == 0


def test_after_the_hooks_are_gone_the_backward_pass_raises(model):
    logits = model.run_with_hooks(model.inputs, fwd_hooks=[(NAME, zero)])
    with pytest.raises(HookValueError, match=r"hooks on blocks\.1\.attn\.hook_z were removed before it"):
        logits.float().sum().backward()


def test_a_hook_that_only_reads_is_called_once(model):
    calls = []
    model.registry.attach(NAME, lambda z, hook: calls.append(z.shape), reads_only=True)
    model.registry.attach("blocks.0.attn.hook_z", zero)
    model(model.inputs).float().sum().backward()
    assert len(calls) == 1
    model.reset_hooks()


def test_without_hooks_nothing_is_wrapped(model):
    layers = [module for module in model.hf_model.modules() if hasattr(module, "gradient_checkpointing")]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    model(model.inputs).float().sum().backward()
    assert functions == [layer._gradient_checkpointing_func for layer in layers] and gradient(model).abs().max() > 0


def test_hooks_that_are_added_after_the_forward_pass_are_not_in_the_recomputation(model):
    model(model.inputs).float().sum().backward()
    expected = gradient(model).clone()
    model.hf_model.zero_grad()
    total = model(model.inputs).float().sum()
    with model.hooks([(NAME, zero)]):
        total.backward()
    torch.testing.assert_close(gradient(model), expected)


def test_a_recomputed_block_is_not_counted_again(model):
    with model.intervene(HeadAblation([(1, 0)], mode="zero", phase="prefill")) as records:
        model(model.inputs).float().sum().backward()
    assert records[0]["applied"] == {"prefill": 1, "decode": 0}

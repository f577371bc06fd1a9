"""Calls of `hf_model` itself, with hooks: compiled or not, in a forward pass and a generation."""

import pytest
import torch

from helpers.wrapped import fresh, model_inputs, plain
from hooked_mllm import HeadAblation, HookedMLLM

FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")
NAME = "blocks.1.hook_mlp_out"


@pytest.fixture(params=FAMILIES)
def model(request) -> HookedMLLM:
    hooked = HookedMLLM.from_model(fresh(request.param), check=False)
    hooked.inputs = model_inputs(request.param)
    return hooked


def shrunk(x, hook):
    return x * 0.3


def test_an_edit_acts_in_compiled_blocks(model):
    hf = model.hf_model
    with model.hooks([(NAME, shrunk)]):
        expected = hf(**model.inputs).logits
    for block in hf.get_submodule(model.family.text.blocks):
        block.compile(backend="eager")
    before = hf(**model.inputs).logits
    with model.hooks([(NAME, shrunk)]):
        assert torch.equal(hf(**model.inputs).logits, expected)
    assert torch.equal(hf(**model.inputs).logits, before) and not torch.equal(before, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_phases_are_those_of_generate(model, phase):
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with model.intervene(HeadAblation([(0, 1), (1, 2)], mode="scale", factor=3.0, phase=phase)) as records:
        expected = model.generate(model.inputs, **options).logits
        applied = dict(records[0]["applied"])
        logits = model.hf_model.generate(**model.inputs, **options).logits
    assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
    assert records[0]["applied"] == {name: 2 * count for name, count in applied.items()}


def test_forward_is_the_models_own_without_hooks(request, model):
    own = model.hf_model.forward
    with model.hooks([(NAME, shrunk)]):
        assert model.hf_model.forward is not own
        model.hf_model(**model.inputs)
    assert "forward" not in vars(model.hf_model)
    family = request.node.callspec.params["model"]
    assert torch.equal(model.hf_model(**model.inputs).logits, plain(family)(**model.inputs).logits)

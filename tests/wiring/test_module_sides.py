"""ModuleSide: activations as views of what modules take and return, and edits written where they belong."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import ALL_FAMILIES
from helpers.wrapped import wrapped
from hooked_mllm.hooks import Call
from hooked_mllm.wiring.module_sides import FusedSide, ModuleSide, module_side


def call(tensor, side="output", **kwargs):
    module = nn.Identity()
    return Call(module, (tensor,), kwargs) if side == "input" else Call(module, (), kwargs, tensor)


def numbers(*shape):
    return torch.arange(float(np.prod(shape))).reshape(shape)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_heads_are_split_as_numpy_splits_them_and_joined_again(packed, side):
    x = numbers(5, 12) if packed else numbers(2, 5, 12)
    place, this = ModuleSide("", side, packed, d_head=4), call(x, side)
    value = place.get(this)
    assert np.array_equal(value.numpy(), x.numpy().reshape(1 if packed else 2, 5, 3, 4))
    assert value.data_ptr() == x.data_ptr()  # a view: an edit in place reaches the module's tensor
    place.put(this, value * 2)
    assert this.touched and torch.equal(place.content(this), x * 2)


def test_heads_that_the_module_splits_itself_stay_as_they_are():
    x = numbers(2, 5, 3, 4)
    place, this = ModuleSide("", "output", d_head=4), call(x)
    assert place.get(this) is x
    place.put(this, x + 1)
    assert torch.equal(this.output, x + 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_one_of_q_k_and_v_is_read_from_a_fused_projection_and_the_others_are_kept(packed, index):
    x = numbers(5, 24) if packed else numbers(2, 5, 24)
    place, this = FusedSide("", "output", packed, d_head=4, index=index), call(x)
    expected = x.numpy().reshape(1 if packed else 2, 5, 3, 2, 4)
    value = place.get(this)
    assert np.array_equal(value.numpy(), expected[:, :, index])
    assert value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    place.put(this, -value)
    expected = expected.copy()
    expected[:, :, index] *= -1
    assert np.array_equal(this.output.numpy(), expected.reshape(x.shape)) and this.output.shape == x.shape


def test_an_edit_in_place_is_written_into_the_tensor_that_the_block_reads_again():
    x = numbers(5, 4)
    before, this = x.clone(), call(x, "input")
    place = ModuleSide("", "input", packed=True, in_place=True)
    place.put(this, place.get(this) + 1)
    assert torch.equal(x, before + 1) and not this.touched and this.args[0] is x


def test_a_keyword_argument_is_replaced():
    x = numbers(2, 5, 4)
    place, this = ModuleSide("", "input", argument="inputs_embeds"), Call(nn.Identity(), (), {"inputs_embeds": x})
    assert place.get(this) is x
    place.put(this, x + 1)
    assert this.touched and torch.equal(this.kwargs["inputs_embeds"], x + 1)


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_module_side_is_a_module_of_the_model(name):
    model = wrapped(name)
    sides = {n: module_side(n, model.hf_model, model.family) for n in model.hook_dict}
    assert all(model.hf_model.get_submodule(s.path) is not None for s in sides.values() if s is not None)
    assert sides["blocks.1.hook_resid_post"].path == f"{model.family.text.blocks}.1"
    assert [n for n in sides if n.endswith("hook_pattern") and sides[n] is not None] == []
    assert module_side("blocks.0.hook_nothing", model.hf_model, model.family) is None


@pytest.mark.parametrize("name", ["vision.blocks.0.hook_attn_out", "vision.blocks.1.hook_mlp_out"])
def test_an_output_that_a_block_scales_is_at_no_module(name):
    for family, expected in (("internvl", False), ("llava_onevision", True)):
        model = wrapped(family)
        assert (module_side(name, model.hf_model, model.family) is not None) == expected

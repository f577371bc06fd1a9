"""What a family has without overriding anything, on the family with the fewest overrides and on a bare one."""

import pytest
import torch

from helpers.tiny import tiny_config
from helpers.wrapped import plain
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.families import FAMILIES, Family, LlavaOnevision, Qwen3VL
from hooked_mllm.families.parts import QWEN_DECODER
from hooked_mllm.layout import VisualItem


def bare():
    """A family that overrides only what it must."""
    body = {name: lambda self, *args: None for name in Family.__abstractmethods__}
    return type("Bare", (Family,), {**body, "name": "bare", "text": QWEN_DECODER})()


def test_what_a_family_must_state():
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Family,), {})()
    assert bare().language_model == "model.language_model"


def test_a_family_without_deepstack_has_no_features():
    assert bare().deepstack_of({"visual": [torch.ones(2, 3)]}) == ([], None)
    assert bare().n_deepstack(plain("internvl")) == 0


def test_features_and_mask_of_deepstack_are_read_from_the_arguments_that_the_family_names():
    features, mask = [torch.ones(2, 3), torch.zeros(2, 3)], torch.tensor([[True, False, True]])
    family = Qwen3VL()
    arguments = dict(zip(family.deepstack_arguments, (features, mask), strict=True))
    found, found_mask = family.deepstack_of({**arguments, "use_cache": True})
    assert [a is b for a, b in zip(found, features, strict=True)] == [True, True] and found_mask is mask
    assert found is not features, "entries are replaced in a list of its own"
    assert family.deepstack_of({family.deepstack_arguments[0]: None}) == ([], None)


def test_sizes_of_the_tower_are_those_of_its_output_projection(family):
    model = plain(family)
    sizes = FAMILIES[model.config.model_type].vision_sizes(model)
    blocks = model.get_submodule(FAMILIES[model.config.model_type].vision.blocks)
    names = ("self_attn.out_proj", "attn.proj", "attention.projection_layer")
    weight = next(m.weight for n, m in blocks[0].named_modules() if n in names)
    assert weight.shape == (sizes.d_model, sizes.n_heads * sizes.d_head)
    assert sizes.n_key_value_heads == sizes.n_heads


def test_patches_keep_the_shape_of_the_modules_output():
    family, output = LlavaOnevision(), torch.randn(2, 12)
    value = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(Family.patch_embed_output(family, value, output), value.reshape(2, 12))
    assert Family.patch_embed_value(family, value) is value


def test_configurations_of_the_two_towers():
    config = tiny_config("qwen3_vl")
    assert bare().text_config(config) is config.text_config and bare().vision_config(config) is config.vision_config


def test_patches_that_a_family_does_not_define():
    with pytest.raises(UnsupportedModelError, match=r"The family 'bare' .*override `vision_patches`"):
        bare().vision_patches(VisualItem.__new__(VisualItem), None)

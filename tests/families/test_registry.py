"""A family of the user's own, registered, and models without a family."""

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from helpers.tiny import tiny_config, tiny_processor
from helpers.wrapped import fresh, model_inputs
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.families import Qwen3VL, register
from hooked_mllm.families.registry import FAMILIES

NO_Z = [("blocks.0.attn.hook_z", lambda z, hook: z * 0)]


def test_an_unsupported_model_type_is_rejected(family):
    model = fresh(family)
    with pytest.raises(UnsupportedModelError, match=f"Expected {type(model).__name__}.*Pass the whole model"):
        HookedMLLM.from_model(model.model)
    with pytest.raises(UnsupportedModelError, match="No family for model_type None. Supported: Qwen3VL"):
        HookedMLLM.from_model(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="No family for model_type"):
        HookedMLLM.from_model(model.model.language_model)


# -- a family of the user's own ----------------------------------------------------------------------------------------


class OwnConfig(Qwen3VLConfig):
    model_type = "own_vl"


class OwnVLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    config_class = OwnConfig


class OwnVL(Qwen3VL):
    """All that a new family takes: its names. Here it shares its modules with another one."""

    name = "own_vl"
    model_types = ("own_vl",)
    model_classes = ("OwnVLForConditionalGeneration",)


@pytest.fixture
def own_family():
    yield register(OwnVL())
    del FAMILIES["own_vl"]


def own_model():
    settings = tiny_config("qwen3_vl", layers=2, vision_layers=2).to_dict()
    settings.pop("model_type")
    torch.manual_seed(0)
    return OwnVLForConditionalGeneration(OwnConfig(**settings)).eval()


def test_a_family_is_added_by_registering_it(own_family):
    model = HookedMLLM.from_model(own_model(), tiny_processor("qwen3_vl"))  # passes its own check
    assert (model.family, model.cfg.family, model.info.family) == (own_family, "own_vl", "own_vl")
    inputs = model_inputs("qwen3_vl")
    with torch.no_grad():
        assert torch.equal(model(inputs), model.hf_model(**inputs).logits)
        assert (model.run_with_hooks(inputs, fwd_hooks=NO_Z) - model(inputs)).abs().max() > 1e-3
        tokens = model.generate(inputs, max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
    sample = model.prepare("What is this?", images=Image.new("RGB", (32, 24)))
    assert int(sample.mask("visual").sum()) == 12


def test_before_it_is_registered_it_is_unknown():
    with pytest.raises(UnsupportedModelError, match="No family for model_type 'own_vl'"):
        HookedMLLM.from_model(own_model())

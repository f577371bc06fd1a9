"""Wrapping a model: once, twice, not at all; and a family that is added without touching another file."""

import gc
import weakref

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from helpers.tiny import tiny_config, tiny_processor
from helpers.wrapped import fresh, model_inputs, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import HookNameError, HookValueError, UnsupportedModelError
from hooked_mllm.families import Qwen3VL, register
from hooked_mllm.families.registry import FAMILIES

NO_Z = [("blocks.0.attn.hook_z", lambda z, hook: z * 0)]


def torch_hooks(model) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@torch.no_grad()
def test_a_model_wrapped_twice_has_one_set_of_hook_points(family):
    model, inputs = fresh(family), model_inputs(family)
    one, two = (HookedMLLM.from_model(model, check=False) for _ in "12")
    base = one(inputs)
    edited = two.run_with_hooks(inputs, fwd_hooks=NO_Z)
    assert (edited - base).abs().max() > 0.1
    with one.hooks(NO_Z):
        assert torch.equal(two(inputs), edited) and list(two.list_hooks()) == ["blocks.0.attn.hook_z"]
        assert torch.equal(model(**inputs).logits, edited)  # the model itself, called without its wrapper
    del one
    gc.collect()
    assert torch.equal(two.run_with_hooks(inputs, fwd_hooks=NO_Z), edited)


@torch.no_grad()
def test_a_dropped_wrapper_is_freed_and_leaves_the_model_as_it_was(family):
    model, inputs = fresh(family), model_inputs(family)
    hooked = HookedMLLM.from_model(model, check=False)
    hooked.add_hook("*", lambda x, hook, held=hooked: None)  # a hook that holds its own wrapper
    hooked.reset_hooks()
    hooked.run_with_cache(inputs)
    gone = weakref.ref(hooked), weakref.ref(hooked.wiring), weakref.ref(hooked.hook_dict["hook_embed"])
    del hooked
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    assert torch.equal(model(**inputs).logits, plain(family)(**inputs).logits)
    assert torch_hooks(model) == torch_hooks(plain(family))  # transformers hangs some of its own


def test_the_model_is_freed_with_its_wrapper(family):
    hooked = HookedMLLM.from_model(fresh(family), check=False)
    hooked.add_hook("*hook_z", lambda z, hook, held=hooked: None)
    gone = weakref.ref(hooked.hf_model)
    del hooked
    gc.collect()
    assert gone() is None


def test_no_module_is_replaced_and_no_name_added(family):
    model, reference = fresh(family), fresh(family)  # a shared one may have generated, which leaves an attribute
    HookedMLLM.from_model(model, tiny_processor(family))  # which runs it, for its check
    reference(**model_inputs(family))
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in reference.named_modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in reference.modules()]


def test_what_no_family_knows_is_refused(family):
    model = fresh(family)
    with pytest.raises(UnsupportedModelError, match=f"Expected {type(model).__name__}.*Pass the whole model"):
        HookedMLLM.from_model(model.model)
    with pytest.raises(UnsupportedModelError, match="No family for model_type None. Supported: Qwen3VL"):
        HookedMLLM.from_model(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="No family for model_type"):
        HookedMLLM.from_model(model.model.language_model)


def test_deepstack_takes_no_edit_off_the_image():
    model, inputs = wrapped("qwen3_vl"), model_inputs("qwen3_vl")
    hooks = [("blocks.0.hook_deepstack", lambda x, hook: x + 1)]
    with pytest.raises(HookValueError, match="positions that hold no visual token.*edit blocks.0.hook_resid_post"):
        model.run_with_hooks(inputs, fwd_hooks=hooks)
    assert torch.equal(model(inputs), plain("qwen3_vl")(**inputs).logits)


@torch.no_grad()
def test_deepstack_is_silent_without_an_image_and_in_decoding():
    model, steps = wrapped("qwen3_vl"), []
    hooks = [("*hook_deepstack", lambda x, hook: steps.append((hook.name, hook.step)))]
    text = {"input_ids": torch.arange(20, 30)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    model.run_with_hooks(text, fwd_hooks=hooks)
    assert steps == []
    with model.hooks(hooks):
        model.generate(model_inputs("qwen3_vl"), max_new_tokens=3, do_sample=False)
    assert steps == [("blocks.0.hook_deepstack", 0), ("blocks.1.hook_deepstack", 0)]


def test_a_family_without_deepstack_names_what_it_has():
    with pytest.raises(HookNameError, match="InternVL.* has no hook point 'blocks.0.hook_deepstack'. Did you mean"):
        wrapped("internvl").add_hook("blocks.0.hook_deepstack", lambda x, hook: None)


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

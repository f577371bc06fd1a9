"""The hooked variants of transformers' attention implementations, and when a tower runs them."""

import copy
import gc

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.siglip import modeling_siglip

from helpers.tiny import tiny_config
from helpers.wrapped import fresh, model_inputs, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.attention.backends import PREFIX, TowerSwitch, hooked_name, implementation, is_known
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.hooks.run_context import RunContext
from hooked_mllm.wiring import wire


class Config:
    def __init__(self, name="sdpa"):
        self._attn_implementation = name


class Restricting:
    def __call__(self, q, k, v, mask, scale, layer):
        raise AssertionError("not called")

    def restrict(self, q, k, mask, scale, layer):
        return mask


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_hooked_variant_is_registered_with_its_mask(base):
    name = hooked_name(base)
    assert name == PREFIX + base and is_known(name) and is_known(base)
    assert name in AttentionInterface() and name in AttentionMaskInterface()
    assert hooked_name(base) == name
    assert not is_known("spda")


def test_a_slim_variant_is_another_of_the_same_implementation():
    config = Config()
    switch = TowerSwitch(config, packed=False)
    switch.take()
    assert config._attn_implementation == PREFIX + "sdpa"
    name = switch.choose("eager", None)
    backend = switch.choose(None, Restricting())
    assert config._attn_implementation == hooked_name("eager", slim=True) and switch.base == "eager"
    switch.withdraw(name)
    assert config._attn_implementation == hooked_name("sdpa", slim=True) != hooked_name("sdpa")
    assert switch.base == "sdpa"
    switch.give_back()
    assert config._attn_implementation == "sdpa"
    switch.withdraw(backend)
    switch.take()
    assert config._attn_implementation == hooked_name("sdpa")
    # masks of flash attention are slim already
    assert hooked_name("flash_attention_2", slim=True) == hooked_name("flash_attention_2")


def test_eager_is_the_function_of_the_modules_own_file():
    llava, qwen = plain("llava_onevision"), plain("qwen3_vl")
    siglip = llava.model.vision_tower.encoder.layers[0].self_attn
    assert implementation(siglip, "eager") is modeling_siglip.eager_attention_forward
    assert implementation(qwen.model.language_model.layers[0].self_attn, "eager") is (
        modeling_qwen3_vl.eager_attention_forward
    )


def test_a_tower_runs_the_hooked_variant_while_it_has_users():
    config = Config()
    switch = TowerSwitch(config, packed=False)
    switch.take()
    switch.take()
    assert config._attn_implementation == hooked_name("sdpa") and switch.base == "sdpa"
    switch.give_back()
    assert config._attn_implementation == hooked_name("sdpa")
    switch.give_back()
    assert config._attn_implementation == "sdpa" == switch.base


def test_users_of_a_freed_switch_do_not_count_for_a_configuration_with_its_id():
    """An `id` is reused after its object was freed: of thousands of configurations some have the same."""
    identities = set()
    for _ in range(2000):
        config = Config()
        switch = TowerSwitch(config, packed=False)
        identities.add(id(config))
        switch.take()
        assert config._attn_implementation == hooked_name("sdpa")
        switch.give_back()
        assert config._attn_implementation == "sdpa"
        switch.take()  # and never released
    assert len(identities) < 2000


def test_after_all_users_were_released_releasing_one_changes_nothing():
    config = Config()
    one, other = (TowerSwitch(config, packed=False) for _ in "12")
    one.take()
    other.take()
    one.release()
    one.give_back()
    assert config._attn_implementation == hooked_name("sdpa")
    other.give_back()
    assert config._attn_implementation == "sdpa"
    one.take()
    assert config._attn_implementation == hooked_name("sdpa")
    one.give_back()
    assert config._attn_implementation == "sdpa"


def test_another_implementation_in_the_body_of_a_with_in_any_order():
    config = Config()
    switch = TowerSwitch(config, packed=True)
    choice = switch.choose("eager", None)
    assert config._attn_implementation == "eager"
    switch.take()
    assert config._attn_implementation == hooked_name("eager", packed=True) and switch.base == "eager"
    switch.withdraw(choice)
    assert config._attn_implementation == hooked_name("sdpa", packed=True)
    choice = switch.choose("eager", None)
    switch.give_back()
    assert config._attn_implementation == "eager"
    switch.withdraw(choice)
    assert config._attn_implementation == "sdpa"


def test_choices_are_withdrawn_in_any_order_and_are_active_in_their_scope_alone():
    config, context = Config(), RunContext()
    switch = TowerSwitch(config, packed=False, context=context)
    with context.scope() as scope, context.registers_in(scope):
        eager = switch.choose("eager", None)
        flex = switch.choose("flex_attention", None)
    assert switch.chosen_base == "sdpa" and not switch.chosen  # outside of the scope
    with switch.applied():
        assert config._attn_implementation == "sdpa"
    switch.withdraw(eager)
    switch.withdraw(flex)
    assert config._attn_implementation == "sdpa"


def test_an_implementation_that_transformers_sets_meanwhile_stays():
    config = Config()
    switch = TowerSwitch(config, packed=False)
    backend = switch.choose(None, Restricting())
    config._attn_implementation = "eager"
    with switch.applied():
        assert config._attn_implementation == "eager"
    switch.withdraw(backend)
    assert config._attn_implementation == "eager"


def test_a_change_of_implementation_by_transformers_is_followed():
    model = fresh("internvl")
    hooked = HookedMLLM.from_model(model, check=False)
    model.set_attn_implementation("eager")
    with hooked.hooks([("blocks.0.attn.hook_z", lambda z, hook: None)]):
        assert model.config.text_config._attn_implementation == hooked_name("eager")
    assert model.config.text_config._attn_implementation == "eager"


@torch.no_grad()
def test_models_built_from_one_configuration_do_not_disturb_each_other():
    config = tiny_config("qwen3_vl", layers=2, vision_layers=2)
    one, two = (HookedMLLM.from_model(Qwen3VLForConditionalGeneration(config).eval(), check=False) for _ in "12")
    assert one.hf_model.config.text_config is two.hf_model.config.text_config
    inputs = model_inputs("qwen3_vl")
    base = two(inputs)
    with two.hooks([("blocks.0.attn.hook_z", lambda z, hook: z * 0)]):
        edited = two(inputs)
        one.run_with_hooks(inputs, fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)])
        assert torch.equal(two(inputs), edited)
        with one.attention("eager"):
            assert (two(inputs) - base).abs().max() > 0.1
    assert torch.equal(two(inputs), base)
    assert config.text_config._attn_implementation == "sdpa"


@torch.no_grad()
def test_hooks_of_both_wrappers_fire_after_a_family_was_registered_again():
    model, inputs = fresh("internvl"), model_inputs("internvl")
    one = HookedMLLM.from_model(model, check=False)
    plain_logits = one(inputs)
    again = wire(model, copy.copy(one.family))
    assert again is not one.wiring

    def zeroed(registry):
        with registry.hooks([("blocks.0.attn.hook_z", lambda z, hook: z * 0)]):
            return one(inputs)

    edited = zeroed(one.registry)
    assert (edited - plain_logits).abs().max() > 0.01
    assert torch.equal(zeroed(again.registry), edited)
    assert torch.equal(zeroed(one.registry), edited)
    del again
    gc.collect()
    assert torch.equal(zeroed(one.registry), edited) and torch.equal(one(inputs), plain_logits)


def test_a_module_of_no_wrapper_under_a_hooked_variant_is_an_error():
    model = fresh("internvl")
    model.config.text_config._attn_implementation = hooked_name("sdpa")
    with pytest.raises(UnsupportedModelError, match="without belonging to a HookedMLLM. Load the model with"):
        model(**model_inputs("internvl"))


@torch.no_grad()
def test_a_copy_of_a_wrapped_model_is_a_plain_model():
    inputs = model_inputs("llava_onevision")
    model = copy.deepcopy(wrapped("llava_onevision").hf_model)
    assert torch.equal(model(**inputs).logits, plain("llava_onevision")(**inputs).logits)


@torch.no_grad()
def test_the_packed_tower_is_called_once_and_gives_the_same():
    model, calls = wrapped("qwen3_vl"), []
    inputs = model_inputs("qwen3_vl", 2, 2)

    def count(z, hook):
        calls.append(z.shape)

    hooked = model.run_with_hooks(inputs, fwd_hooks=[("vision.blocks.1.attn.hook_z", count)])
    patches = int(inputs["image_grid_thw"].prod(-1).sum())
    assert calls == [(1, patches, 2, 16)]
    assert torch.equal(hooked, plain("qwen3_vl")(**inputs).logits)


def test_towers_go_back_when_a_wrapper_is_dropped_with_hooks_on():
    model = fresh("internvl")
    hooked = HookedMLLM.from_model(model, check=False)
    hooked.add_hook("*hook_z", lambda z, hook: z * 0)
    hooked.add_perma_hook("*hook_resid_pre", lambda z, hook: z * 0)
    assert model.config.text_config._attn_implementation.startswith(PREFIX)
    del hooked
    gc.collect()
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    inputs = model_inputs("internvl")
    assert torch.equal(model(**inputs).logits, plain("internvl")(**inputs).logits)

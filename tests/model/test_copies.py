"""Copies of a wrapped model: independent and hooked, or rejected with the way out."""

import copy
import pickle

import pytest
import torch

from helpers.tiny import tiny_image, tiny_processor
from helpers.wrapped import fresh, model_inputs, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import HookValueError

NAMES = ("blocks.0.attn.hook_z", "blocks.1.hook_resid_mid", "vision.blocks.0.attn.hook_q", "hook_logits")


def zero(x, hook):
    return x * 0


def test_a_deep_copy_is_a_model_of_its_own(family):
    model, inputs = HookedMLLM.from_model(fresh(family), tiny_processor(family), check=False), model_inputs(family)
    model.note = {"of": "a subclass"}
    first = model.prepare("Where is the mug?", images=tiny_image())
    other = copy.deepcopy(model)
    assert other.hf_model is not model.hf_model and other.family is model.family
    assert other.note == model.note and other.note is not model.note and repr(other) == repr(model)
    names = [*NAMES, *(name for name in model.hook_dict if name.endswith("hook_deepstack"))]
    expected = {name: wrapped(family).run_with_hooks(inputs, fwd_hooks=[(name, zero)]) for name in names}
    for name in names:
        with model.hooks([(name, lambda x, hook: pytest.fail("a hook of the original fired"))]):
            assert torch.equal(other.run_with_hooks(inputs, fwd_hooks=[(name, zero)]), expected[name]), name
    assert torch.equal(other.run_with_cache(inputs)[0], plain(family)(**inputs).logits)
    other.hf_model.lm_head.weight.data.zero_()
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)
    prepared = other.prepare("Where is the mug?", images=tiny_image())
    assert torch.equal(prepared.inputs["input_ids"], first.inputs["input_ids"])
    other.check()


def test_a_copy_keeps_a_backend_that_was_chosen_on_loading():
    class Doubled:
        def __call__(self, q, k, v, mask, scale, layer):
            groups = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
            return 2 * torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.full()[:, None]).transpose(1, 2)

    model, inputs = HookedMLLM.from_pretrained("toy-qwen3-vl", attention=Doubled(), check=False), {}
    inputs["input_ids"] = torch.arange(20, 30)[None]
    other = copy.deepcopy(model)
    assert torch.equal(other(inputs), model(inputs))
    assert other.wiring.text[0].backend is not model.wiring.text[0].backend


def test_a_shallow_copy_shares_the_model(family):
    model, inputs = wrapped(family), model_inputs(family)
    other = copy.copy(model)
    assert other.hf_model is model.hf_model and other.hook_dict["hook_embed"] is model.hook_dict["hook_embed"]
    assert torch.equal(
        other.run_with_hooks(inputs, fwd_hooks=[("hook_embed", zero)]),
        model.run_with_hooks(inputs, fwd_hooks=[("hook_embed", zero)]),
    )


@pytest.mark.parametrize("active", ["hook", "permanent", "attention", "global attention hook"])
def test_a_model_with_active_hooks_is_not_copied(family, active):
    model = HookedMLLM.from_model(fresh(family), check=False)
    contexts = {
        "hook": model.hooks([("hook_embed", zero)]),
        "permanent": model.hooks(),
        "attention": model.attention("eager"),
        "global attention hook": model.hooks(),
    }
    with contexts[active]:
        if active == "permanent":
            model.add_perma_hook("hook_logits", zero)
        if active == "global attention hook":
            model.add_hook("blocks.0.attn.hook_pattern", zero)
        with pytest.raises(HookValueError, match="is not copied: copy it outside of their `with`"):
            copy.deepcopy(model)
    model.reset_hooks(including_permanent=True)
    assert torch.equal(copy.deepcopy(model)(model_inputs(family)), plain(family)(**model_inputs(family)).logits)


def test_pickles_are_rejected_with_the_way_out(family):
    model = wrapped(family)
    with pytest.raises(HookValueError, match="not pickled, as its hooks are functions.*from_pretrained"):
        pickle.dumps(model)
    with model.hooks([("blocks.0.hook_resid_post", zero)]):
        with pytest.raises(HookValueError, match="neither copied nor pickled.*reset_hooks"):
            copy.deepcopy(model.hf_model)
    with pytest.raises(HookValueError, match="neither copied nor pickled"):
        copy.deepcopy(model.registry)

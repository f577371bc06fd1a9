"""Wrapping a model: once, twice, not at all; and a family that is added without touching another file."""

import gc
import weakref

import torch

from helpers.tiny import tiny_processor
from helpers.wrapped import fresh, model_inputs, plain
from hooked_mllm import HookedMLLM

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
    assert torch_hooks(model) == torch_hooks(plain(family))  # transformers registers some of its own


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

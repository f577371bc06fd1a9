"""Copies of caches: their own tensors, the same model; pickles are rejected with the way out."""

import copy
import pickle

import pytest
import torch

from helpers.wrapped import model_inputs, wrapped
from hooked_mllm.cache.lazy import parts_of
from hooked_mllm.errors import HookValueError


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_deep_copy_has_tensors_of_its_own_and_the_same_model(family, mode):
    model = wrapped(family)
    with mode():
        _, cache = model.run_with_cache(model_inputs(family))
        expected = {name: value.clone() for name, value in cache.items()}
        other = copy.deepcopy(cache)
        assert other.model is model and list(other) == list(cache) and other.nbytes == cache.nbytes
        assert all(torch.equal(value, expected[name]) for name, value in other.items())
        assert torch.equal(other.logit_lens("last"), cache.logit_lens("last"))
        for name in other:
            for part in parts_of(other.entry(name)):
                part.zero_()
        assert all(torch.equal(value, expected[name]) for name, value in cache.items())


def test_the_weights_that_results_are_computed_from_are_not_copied(family):
    model = wrapped(family)
    _, cache = model.run_with_cache(model_inputs(family), "*hook_result")
    other = copy.deepcopy(cache)
    assert all(torch.equal(other[name], value) for name, value in cache.items())
    assert other.entry("blocks.0.attn.hook_result").o_proj is cache.entry("blocks.0.attn.hook_result").o_proj


def test_steps_of_a_generation_stay_one_sequence_in_a_copy(family):
    model = wrapped(family)
    _, cache = model.run_with_cache(model_inputs(family), "blocks.*", generate={"max_new_tokens": 3})
    other = copy.deepcopy(cache)
    assert other.nbytes == cache.nbytes
    assert all(torch.equal(other[key], cache[key]) for key in (("pattern", 1), ("z", 0), ("rot_k", 2)))


def test_a_shallow_copy_shares_its_tensors(family):
    _, cache = wrapped(family).run_with_cache(model_inputs(family), "*hook_z")
    other = copy.copy(cache)
    assert all(other[name] is value for name, value in cache.items())


@pytest.mark.parametrize("generate", [None, {"max_new_tokens": 2}])
def test_pickles_are_rejected_with_the_way_out(family, generate):
    _, cache = wrapped(family).run_with_cache(model_inputs(family), "*hook_z", generate=generate)
    with pytest.raises(HookValueError, match=r"`cache\.save\(path\)`, and read it with ActivationCache\.load"):
        pickle.dumps(cache)

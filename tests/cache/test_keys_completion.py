"""Every key that IPython offers reads what the hook name reads."""

import inspect

import pytest

from hooked_mllm import HookedMLLM
from hooked_mllm.toys import VisualRetrieval


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sample(model):
    return VisualRetrieval(pages=1).samples(model, 1)[0]


def test_short_keys_and_hook_names(model, sample):
    _, cache = model.run_with_cache(sample)
    keys = cache._ipython_key_completions_()
    names = [*cache.keys()]
    short = keys[: -len(names)]
    assert keys[-len(names) :] == names and len(short) == len(names)
    assert [cache.name_of(key) for key in short] == names
    assert {"embed", ("z", 3), ("scale", 0, "ln2"), ("vision", "z", 2), ("projector", "out")} <= set(short)


def test_gradients_and_ambiguous_names_of_norms(model, sample):
    names = ["blocks.1.ln1.hook_scale", "blocks.1.attn.hook_z", "hook_embed"]
    _, cache = model.run_with_cache(sample, names_filter=names, incl_bwd=lambda logits: logits.sum())
    held = [*cache.keys()]
    assert any(name.endswith("_grad") for name in held)
    short = cache._ipython_key_completions_()[: len(held)]
    assert [cache.name_of(key) for key in short] == held


def test_generations_offer_the_keys_of_their_prefill(model, sample):
    _, cache = model.run_with_cache(sample, names_filter="*hook_z", generate={"max_new_tokens": 2})
    keys = cache._ipython_key_completions_()
    assert ("z", 0) in keys and "blocks.0.attn.hook_z" in keys
    assert all(key in cache for key in keys)


def test_hook_points_are_a_dict_which_ipython_completes_by_itself(model):
    """It completes the keys of any dict, but evaluates no property."""
    assert isinstance(model.hook_dict, dict) and "blocks.0.attn.hook_z" in model.hook_dict
    assert not isinstance(inspect.getattr_static(type(model), "hook_dict"), property)
    assert model.mod_dict is model.hook_dict is model.registry.hook_dict

"""Hooks on a whole model, and nothing left of them after an error."""

import pytest
import torch

from helpers.wrapped import in_place, model_inputs, plain, wrapped
from hooked_mllm.errors import HookNameError


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["vision.blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.0.hook_mlp_out"])
@torch.no_grad()
def test_after_an_error_in_a_hook_the_model_is_clean(family, name, error):
    inputs, model = model_inputs(family), wrapped(family)
    model(inputs)  # transformers registers hooks of its own when some towers first run
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules()]

    def fail(x, hook):
        raise error("in the hook")

    for run in (
        lambda: model.run_with_hooks(inputs, fwd_hooks=[("hook_embed", in_place("hook_embed")), (name, fail)]),
        lambda: model.run_with_hooks(inputs, fwd_hooks=[(name, fail)], stop_at_layer=2),
    ):
        with pytest.raises(error, match="in the hook"):
            run()
    with pytest.raises(error), model.hooks([(name, fail)]):
        model.run_with_cache(inputs)
    assert model.list_hooks() == {}
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules()] == before
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


@pytest.fixture
def model():
    """A model whose hooks are removed after the test."""
    yield wrapped("internvl")
    wrapped("internvl").reset_hooks(including_permanent=True)


def zero(z, hook):
    return z * 0


def test_every_hook_point_has_both_names_of_transformerlens(model):
    assert model.mod_dict is model.hook_dict and list(model.hook_dict.values()) == model.hook_points()
    assert list(model.hook_dict) == [point.name for point in model.hook_points()]


@torch.no_grad()
def test_a_hook_acts_until_it_is_reset(model):
    inputs = model_inputs("internvl")
    plain_logits = model(inputs)
    model.add_hook("blocks.1.attn.hook_z", zero)
    assert list(model.list_hooks()) == ["blocks.1.attn.hook_z"]
    edited = model(inputs)
    assert not torch.equal(edited, plain_logits)
    model.reset_hooks()
    assert model.list_hooks() == {} and torch.equal(model(inputs), plain_logits)
    assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_z", zero)]), edited)
    assert model.list_hooks() == {}


def test_permanent_hooks_stay_unless_they_are_named(model):
    model.add_perma_hook("blocks.0.attn.hook_z", zero)
    model.add_hook("blocks.1.attn.hook_z", zero, level=2)
    assert list(model.list_hooks(including_permanent=False)) == ["blocks.1.attn.hook_z"]
    model.reset_hooks(level=1)
    assert len(model.list_hooks()) == 2
    model.reset_hooks()
    assert list(model.list_hooks()) == ["blocks.0.attn.hook_z"]
    model.remove_all_hook_fns(including_permanent=True)
    assert model.list_hooks() == {}


@torch.no_grad()
def test_contexts_are_cleared_only_on_request(model):
    point = model.hook_dict["blocks.0.hook_resid_pre"]
    hooks = [("blocks.0.hook_resid_pre", lambda x, hook: hook.ctx.update(mean=x.mean()))]
    with model.hooks(hooks):
        model(model_inputs("internvl"))
    assert set(point.ctx) == {"mean"}
    model.remove_all_hook_fns()
    assert set(point.ctx) == {"mean"}
    with model.hooks(hooks, clear_contexts=True):
        model(model_inputs("internvl"))
    assert point.ctx == {}


def test_an_unknown_name_registers_nothing(model):
    with pytest.raises(HookNameError, match=r"Did you mean 'blocks\.0\.attn\.hook_z'"):
        model.add_hook(["hook_embed", "blocks.0.attn.hook_zz"], zero)
    assert model.list_hooks() == {}

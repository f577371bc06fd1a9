"""`model.intervene` removes every hook that it registers; interventions nest, combine and are recorded."""

import json

import pytest
import torch

from helpers.intervention_witness import GREEDY, batch, sample
from helpers.wrapped import plain, wrapped
from hooked_mllm import ActivationPatch, AttentionKnockout, HeadAblation, HeadPatch, Intervention, Steer
from hooked_mllm.errors import HeadError, HookNameError, HookValueError
from hooked_mllm.heads import HeadSet


@torch.no_grad()
def every(family):
    """One intervention of each kind."""
    model = wrapped(family)
    _, cache = model.run_with_cache(sample(family, 6, 0))
    return [
        HeadAblation(HeadSet([(0, 1)], n_layers=3, n_heads=4), mode="zero", phase="both"),
        HeadAblation([(1, 1)], mode="uniform", phase="prefill", positions=[2, 3]),
        HeadAblation([(0, 0)], mode="zero", phase="prefill", tower="vision"),
        AttentionKnockout(layers=range(2), queries="last", keys="visual", phase="both"),
        HeadPatch([(2, 0)], cache),
        ActivationPatch("mlp_out", cache, layers=1, positions="target"),
        Steer(torch.ones(32), 1, torch.tensor([True] * len(sample(family))), 0.5),
    ]


def torch_hooks(model):
    """The number of torch hooks in the transformers model, which keeps some of its own."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf_model.modules())


@torch.no_grad()
def test_logits_are_the_same_before_and_after_each_and_all(family):
    model, inputs = wrapped(family), sample(family)
    before, tokens = model(inputs), model.generate(inputs, **GREEDY)
    assert torch.equal(before, plain(family)(**inputs.inputs).logits)
    chosen, hook_count = every(family), torch_hooks(model)
    for some in (*([one] for one in chosen), chosen):
        with model.intervene(*some) as records:
            assert not torch.equal(model(inputs), before)
            assert model.list_hooks()
        assert all(sum(r["applied"].values()) > 0 for r in records)
        assert not model.list_hooks()
        assert torch.equal(model(inputs), before)
    with model.intervene(*chosen):
        model.generate(inputs, **GREEDY)
    assert torch.equal(model.generate(inputs, **GREEDY), tokens)
    assert torch_hooks(model) == hook_count
    json.dumps(records)
    assert all(record["intervention"] in repr(one) for one, record in zip(chosen, records, strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["body", "forward", "generate"])
@torch.no_grad()
def test_nothing_is_left_after_an_error_or_an_interrupt(error, where):
    model, inputs = wrapped("llava_onevision"), sample("llava_onevision")
    before, hook_count = model(inputs), torch_hooks(model)

    def stop(x, hook):
        if where == "forward" or hook.step == 1:
            raise error

    with pytest.raises(error), model.intervene(*every("llava_onevision")):
        if where == "body":
            raise error
        with model.hooks([("blocks.2.hook_resid_post", stop)]):
            model(inputs) if where == "forward" else model.generate(inputs, **GREEDY)
    assert not model.list_hooks() and model.registry.running is None
    assert torch_hooks(model) == hook_count
    assert torch.equal(model(inputs), before)


@torch.no_grad()
def test_nested_ones_act_together_and_leave_each_others_hooks(family):
    model, inputs, fired = wrapped(family), batch(family), []
    a = HeadAblation([(0, 1)], mode="zero", phase="prefill")
    b = HeadAblation([(2, 2)], mode="scale", factor=3.0, phase="prefill")
    with model.intervene(a, b):
        both = model(inputs)
    with model.intervene(a), model.hooks([("blocks.0.attn.hook_z", lambda z, hook: fired.append(1))]):
        alone = model(inputs)
        with model.intervene(b):
            assert torch.equal(model(inputs), both)
        with model.intervene(a):  # the same object again, which zeroes zeros
            assert torch.equal(model(inputs), alone)
        assert torch.equal(model(inputs), alone)
        assert len(model.list_hooks()["blocks.0.attn.hook_z"]) == 2
    assert len(fired) == 4 and not model.list_hooks()


@torch.no_grad()
def test_they_act_in_the_order_in_which_they_are_given():
    model, inputs, seen = wrapped("internvl"), sample("internvl"), []
    add = Steer(torch.ones(32), 0, site="attn_out")
    put = ActivationPatch("attn_out", torch.full((1, len(inputs), 32), 5.0), layers=0)
    for order in ((add, put), (put, add)):
        with model.intervene(*order), model.hooks([("blocks.0.hook_attn_out", lambda x, hook: seen.append(x.clone()))]):
            model(inputs)
    assert (seen[0] == 5).all() and (seen[1] == 6).all()


def test_all_are_checked_before_any_is_registered():
    model = wrapped("qwen3_vl")
    good = HeadAblation([(0, 1)], mode="zero", phase="both")
    with pytest.raises(HeadError), model.intervene(good, HeadAblation([(7, 0)], mode="zero", phase="both")):
        raise AssertionError("the body ran")
    with pytest.raises(HookValueError, match="got function"), model.intervene(good, lambda z, hook: z):
        raise AssertionError("the body ran")

    class Late(Intervention):
        def validate(self, model):
            pass

        def edits(self, model):
            yield "hook_embed", lambda x, hook: x
            yield "hook_nowhere", lambda x, hook: x

        def describe(self):
            return {"intervention": "Late"}

    with pytest.raises(HookNameError), model.intervene(good, Late()):
        raise AssertionError("the body ran")
    assert not model.list_hooks()

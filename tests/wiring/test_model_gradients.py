"""Backward hooks on models: the gradients that autograd finds, and edits of them, at every point."""

import pytest
import torch

from helpers.eager_reference import Reference
from helpers.tiny import ALL_FAMILIES
from helpers.wrapped import fresh, in_place, model_inputs, plain, wrapped
from hooked_mllm import HookedMLLM


def scalar(logits):
    """A function of all logits whose gradient is not constant."""
    return logits.float().pow(2).mean()


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_point_has_a_gradient_in_a_frozen_model(name):
    model, inputs, seen = wrapped(name), model_inputs(name), {}
    hooks = [("*", lambda g, hook: seen.__setitem__(hook.name, g))]
    logits = model.run_with_hooks(inputs, bwd_hooks=hooks)
    torch.testing.assert_close(logits.detach(), plain(name)(**inputs).logits, atol=1e-4, rtol=1e-4)
    assert seen == {} and model.list_hooks() == {}  # gone from the points, still on the graph
    scalar(logits).backward()
    assert set(seen) == set(model.hook_dict)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in seen.values())


MODULES = {
    "hook_embed": "model.language_model",
    "blocks.1.hook_resid_post": "model.language_model.layers.1",
    "blocks.1.mlp.hook_pre": "model.language_model.layers.1.mlp.gate_proj",
    "blocks.0.attn.hook_v": "model.language_model.layers.0.self_attn.v_proj",
    "blocks.1.hook_attn_out": "model.language_model.layers.1.self_attn.o_proj",
}


def test_gradients_equal_those_of_autograd_by_hand(family):
    """torch.autograd.grad on the module outputs of an unwrapped model."""
    inputs, model, seen = model_inputs(family), plain(family), {}
    names = [n for n in MODULES if n != "hook_embed"]
    wrapped(family)  # made outside the recording
    logits = wrapped(family).run_with_hooks(inputs, bwd_hooks=[(names, lambda g, hook: seen.__setitem__(hook.name, g))])
    scalar(logits).backward()
    outputs = {}

    def keep(name):
        def fn(module, args, output):
            output = output if output.requires_grad else output.requires_grad_(True)
            outputs[name] = output

        return fn

    handles = [model.get_submodule(MODULES[n]).register_forward_hook(keep(n)) for n in names]
    loss = scalar(model(**inputs).logits)
    for handle in handles:
        handle.remove()
    for name, expected in zip(names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True):
        torch.testing.assert_close(seen[name].reshape(expected.shape), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tower", ["text", "vision"])
def test_gradients_of_scores_and_pattern_equal_those_of_the_reference(family, tower):
    inputs, reference, leaves, seen = model_inputs(family), Reference(family), {}, {}

    def leaf(name):
        def fn(x):
            leaves[name] = x.detach().requires_grad_(True) if not x.requires_grad else x
            return leaves[name]

        return fn

    points = ("attn_scores", "pattern", "z", "rot_q", "rot_k")
    loss = scalar(reference(inputs, {(tower, 1, p): leaf(p) for p in points}))
    expected = dict(zip(points, torch.autograd.grad(loss, [leaves[p] for p in points]), strict=True))
    prefix = "" if tower == "text" else "vision."
    names = {f"{prefix}blocks.1.attn.hook_{p}": p for p in points}
    logits = wrapped(family).run_with_hooks(
        inputs, bwd_hooks=[(list(names), lambda g, hook: seen.__setitem__(names[hook.name], g))]
    )
    scalar(logits).backward()
    for p in points:
        torch.testing.assert_close(seen[p], expected[p], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.hook_pattern", "blocks.0.hook_resid_mid", "vision.blocks.1.attn.hook_z"]
)
def test_a_gradient_that_a_hook_returns_replaces_it(family, name):
    """Zero gradients at a point stop what lies before it on that path; doubled ones double it."""
    inputs, model, seen = model_inputs(family), wrapped(family), []
    for factor in (1.0, 2.0, 0.0):
        hooks = [
            (name, lambda g, hook, f=factor: g * f),
            (name, lambda g, hook: seen.append(g)),  # sees what the first one returned
        ]
        scalar(model.run_with_hooks(inputs, bwd_hooks=hooks)).backward()
    assert torch.equal(seen[1], 2 * seen[0]) and seen[2].abs().max() == 0


def test_a_gradient_hook_reaches_the_parameters_behind_it():
    model, inputs = HookedMLLM.from_model(fresh("internvl"), check=False), model_inputs("internvl")
    weight = model.hf_model.model.language_model.layers[0].self_attn.v_proj.weight.requires_grad_(True)
    scalar(model(inputs)).backward()
    whole = weight.grad.clone()
    weight.grad = None
    stop = [(f"blocks.{l}.hook_{p}", lambda g, hook: (g * 0,)) for l in (0,) for p in ("attn_out",)]
    scalar(model.run_with_hooks(inputs, bwd_hooks=stop)).backward()
    assert whole.abs().max() > 0 and weight.grad.abs().max() == 0


@pytest.mark.parametrize("trained", [True, False])
def test_edits_in_place_and_by_functions_of_themselves_leave_the_backward_pass_whole(family, trained):
    """Autograd saves softmax's and sqrt's own results, and what x * sigmoid(x) is made of."""
    model, inputs = wrapped(family), model_inputs(family)
    names = ["*hook_scale", "*hook_pattern", "*hook_z", "*hook_resid_pre", "*hook_resid_mid", "*hook_out"]
    hooks = [(names, lambda x, hook: (x.mul_(1.1), None)[1]), (names, lambda x, hook: x * torch.sigmoid(x))]
    model.hf_model.requires_grad_(trained)
    try:
        logits = model.run_with_hooks(inputs, fwd_hooks=hooks)
        with torch.no_grad():
            expected = model.run_with_hooks(inputs, fwd_hooks=hooks)
        torch.testing.assert_close(logits.detach(), expected, atol=1e-4, rtol=1e-4)
        if trained:
            scalar(logits).backward()
            assert model.hf_model.model.language_model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    finally:
        model.hf_model.requires_grad_(False)
        model.hf_model.zero_grad(set_to_none=True)


def test_embeddings_that_a_caller_passes_get_gradients_and_are_not_edited(family):
    model = wrapped(family)
    embeds = model.hf_model.get_input_embeddings()(torch.arange(20, 30)[None]).clone().requires_grad_(True)
    before = embeds.detach().clone()
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    hooks = [(n, in_place(n)) for n in ("hook_embed", "blocks.0.hook_resid_pre")]
    scalar(model.run_with_hooks(inputs, fwd_hooks=hooks)).backward()
    assert torch.equal(embeds.detach(), before) and embeds.grad.abs().max() > 0

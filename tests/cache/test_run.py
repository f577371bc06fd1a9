"""Gradients alongside activations, and the options of `run_with_cache` that exclude each other."""

import pytest
import torch

from helpers.cache_witness import batch, close, film, hooked, plain, sample
from helpers.tiny import tiny_model
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import HookNameError, HookValueError, InputError


def logit_difference(logits):
    return logits[:, -1, 7].sum() - logits[:, -1, 9].sum()


def modules(hf_model) -> dict:
    """Where plain torch finds activations: the module, and whether its input or its output."""
    layer = hf_model.model.language_model.layers[1]
    return {
        "blocks.1.hook_resid_pre": (layer, "input"),
        "blocks.1.hook_resid_post": (layer, "output"),
        "blocks.1.attn.hook_z": (layer.self_attn.o_proj, "input"),
        "blocks.1.attn.hook_q": (
            layer.self_attn.q_norm if hasattr(layer.self_attn, "q_norm") else layer.self_attn.q_proj,
            "output",
        ),
        "blocks.1.hook_mlp_out": (layer.mlp, "output"),
        "blocks.1.mlp.hook_post": (layer.mlp.down_proj, "input"),
        "hook_logits": (hf_model.lm_head, "output"),
    }


def by_hand(hf_model, inputs, scalar) -> dict[str, torch.Tensor]:
    """Gradients of `scalar(output)` by `torch.autograd` on the plain model."""
    seen, handles = {}, []

    def watch(name, x):
        x.requires_grad_(True)
        x = x * 1  # a node of its own, so that what follows sees this tensor alone
        seen[name] = x
        return x

    for name, (module, side) in modules(hf_model).items():

        def pre(module, args, kwargs, name=name):
            if args:
                return (watch(name, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": watch(name, kwargs["hidden_states"])}

        def post(module, args, output, name=name):
            return watch(name, output)

        if side == "input":
            handles.append(module.register_forward_pre_hook(pre, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(post))
    try:
        with torch.enable_grad():
            grads = torch.autograd.grad(scalar(hf_model(**inputs, use_cache=False)), list(seen.values()))
    finally:
        for handle in handles:
            handle.remove()
    return dict(zip(seen, grads, strict=True))


def compare(cache, expected) -> None:
    for name, gradient in expected.items():
        close(cache[name + "_grad"].reshape(gradient.shape), gradient)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("make", [sample, batch, film])
def test_gradients_are_those_of_autograd_by_hand(family, make):
    model, inputs = hooked(family), make(family)
    expected = by_hand(plain(family, "sdpa"), inputs.inputs, lambda out: logit_difference(out.logits))
    logits, cache = model.run_with_cache(inputs, incl_bwd=logit_difference)
    compare(cache, expected)
    assert not logits.requires_grad and not any(v.requires_grad for v in cache.values())
    close(logits, model(inputs), 1e-4)
    assert not any(n.endswith(("pattern_grad", "scores_grad", "result_grad")) for n in cache)


@pytest.mark.parametrize("make", [sample, batch])
def test_with_true_the_loss_is_that_of_the_answer(family, make):
    model, inputs = hooked(family), make(family)
    labels = inputs.inputs["input_ids"].masked_fill(~inputs.mask("answer"), -100)
    expected = by_hand(plain(family, "sdpa"), {**inputs.inputs, "labels": labels}, lambda out: out.loss)
    loss, cache = model.run_with_cache(inputs, ["blocks.1.*", "hook_logits"], incl_bwd=True)
    compare(cache, {n: g for n, g in expected.items()})
    logits = model(inputs)[:, :-1]
    answer = inputs.mask("answer")[:, 1:]
    close(loss, -logits[answer].log_softmax(-1).gather(1, labels[:, 1:][answer][:, None]).mean())
    again, other = model.run_with_cache({**inputs.inputs, "labels": labels}, "blocks.1.attn.hook_z", incl_bwd=True)
    close(again, loss)
    close(other["z_grad", 1], cache["z_grad", 1])


def test_gradients_of_the_vision_tower_are_where_its_activations_are(family):
    model, inputs = hooked(family), film(family)
    names = [
        "vision.hook_patch_embed",
        "vision.blocks.1.hook_resid_post",
        "projector.hook_out",
        "vision.blocks.0.attn.hook_z",
    ]
    _, cache = model.run_with_cache(inputs, names, incl_bwd=logit_difference)
    for name in names:
        added: list[torch.Tensor] = []  # one tensor for each call of the tower, in the order of the calls

        def add(x, hook, added=added):
            added.append(torch.zeros_like(x, requires_grad=True))
            return x + added[-1]

        with torch.enable_grad(), model.hooks([(name, add)]):
            expected = torch.autograd.grad(logit_difference(model(inputs)), added)
        assert len(expected) == (1 if family == "internvl" else 2)
        assert cache[name].shape == cache[name + "_grad"].shape
        close(cache[name + "_grad"], torch.cat(expected, dim=1 if family == "qwen3_vl" else 0))


def test_gradients_of_patterns_are_kept_when_they_are_named(family):
    model, inputs = hooked(family), batch(family)
    names = [
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_attn_scores",
        "blocks.1.attn.hook_z",
        "blocks.1.attn.hook_v",
    ]
    _, cache = model.run_with_cache(inputs, names, incl_bwd=logit_difference)
    v = cache["v", 1].repeat_interleave(2, dim=2)
    expected = torch.einsum("bqhd,bkhd->bhqk", cache["z_grad", 1], v)
    pattern = cache["pattern", 1]
    close(cache["pattern_grad", 1], expected)
    softmax = pattern * (expected - (expected * pattern).sum(-1, keepdim=True))
    real = ~inputs.mask("padding")
    for b in range(2):
        close(cache["attn_scores_grad", 1][b][:, real[b]][..., real[b]], softmax[b][:, real[b]][..., real[b]])
    _, rows = model.run_with_cache(inputs, names[:1], incl_bwd=logit_difference, queries=[-1], keys="visual")
    whole = cache["pattern_grad", 1][:, :, -1:]
    for b in range(2):
        visual = inputs.mask("visual")[b]
        close(rows["pattern_grad", 1][b, ..., : int(visual.sum())], whole[b][..., visual])
    _, cut = model.run_with_cache(inputs, [*names[:1], names[2]], incl_bwd=logit_difference, pos_slice=slice(-2, None))
    close(cut["pattern_grad", 1], cache["pattern_grad", 1][:, :, -2:])
    close(cut["z_grad", 1], cache["z_grad", 1][:, -2:])


def test_gradients_of_head_results_are_kept_when_they_are_named(family):
    _, cache = hooked(family).run_with_cache(
        sample(family), ["blocks.1.attn.hook_result", "blocks.1.hook_attn_out"], incl_bwd=True
    )
    for head in range(4):
        close(cache["result_grad", 1][:, :, head], cache["attn_out_grad", 1])


def test_the_models_parameters_are_left_as_they_were(family):
    hf_model = tiny_model(family)
    model = HookedMLLM.from_model(hf_model, check=False)
    frozen = hf_model.lm_head.weight.requires_grad_(False)
    marker = hf_model.model.language_model.norm.weight
    marker.grad = torch.ones_like(marker)
    inputs = dict(sample(family).inputs)
    _, cache = model.run_with_cache(inputs, incl_bwd=logit_difference)
    assert ("z_grad", 0) in cache
    with pytest.raises(ZeroDivisionError):
        model.run_with_cache(inputs, incl_bwd=lambda logits: 1 / 0)
    for name, parameter in hf_model.named_parameters():
        assert parameter.requires_grad is (parameter is not frozen), name
        assert parameter.grad is None or parameter is marker
    assert torch.equal(marker.grad, torch.ones_like(marker))


def test_gradients_are_those_behind_the_hooks_that_edit(family):
    model, inputs = hooked(family), sample(family)
    with model.hooks([("blocks.2.attn.hook_z", lambda z, hook: z * 0)]):
        _, cache = model.run_with_cache(
            inputs, ["blocks.*hook_z", "blocks.*hook_resid_post"], incl_bwd=logit_difference
        )
    assert not cache["z", 2].any() and cache["z_grad", 2].any()
    _, plain_cache = model.run_with_cache(inputs, "blocks.1.hook_resid_post", incl_bwd=logit_difference)
    assert not torch.allclose(cache["resid_post_grad", 1], plain_cache["resid_post_grad", 1])


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_do_not_depend_on_the_callers_grad_mode(family, grad):
    with torch.set_grad_enabled(grad):
        _, cache = hooked(family).run_with_cache(sample(family), "blocks.0.attn.hook_z", incl_bwd=logit_difference)
        assert torch.is_grad_enabled() is grad
    assert cache["z_grad", 0].any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_caching_works_without_autograd(family, mode):
    model, inputs = hooked(family), sample(family)
    with mode():
        _, cache = model.run_with_cache(inputs)
    _, expected = model.run_with_cache(inputs)
    assert all(torch.equal(cache[n], expected[n]) for n in expected)


def test_what_has_no_gradient_is_rejected():
    model, inputs = hooked("qwen3_vl"), sample("qwen3_vl")
    for wrong in (lambda logits: logits, lambda logits: 3.0, lambda logits: logits.argmax(-1)):
        with pytest.raises(HookValueError, match="one number"):
            model.run_with_cache(inputs, "blocks.0.hook_resid_pre", incl_bwd=wrong)
    with pytest.raises(HookValueError, match="no gradient"):
        model.run_with_cache(inputs, lambda n: False, incl_bwd=logit_difference)
    with pytest.raises(HookValueError, match="no gradient"):
        model.run_with_cache(inputs, "hook_embed", incl_bwd=lambda logits: logits.detach().sum())
    question = hooked("qwen3_vl").prepare("What colour is the mug?")
    with pytest.raises(InputError, match="answer"):
        model.run_with_cache(question, incl_bwd=True)


@pytest.mark.parametrize(
    "options",
    [
        {"incl_bwd": True, "stop_at_layer": 1},
        {"incl_bwd": True, "generate": {}},
        {"incl_bwd": True, "return_logits": False},
        {"generate": {}, "stop_at_layer": 1},
        {"generate": {}, "remove_batch_dim": True},
    ],
)
def test_options_that_exclude_each_other(options):
    with pytest.raises(HookValueError, match="exclude each other"):
        hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"), **options)


def test_gradients_of_what_is_not_there():
    _, cache = hooked("qwen3_vl").run_with_cache(sample("qwen3_vl"), "blocks.0.attn.hook_z", incl_bwd=True)
    assert ("z_grad", 0) in cache and ("z_grad", 1) not in cache
    with pytest.raises(HookNameError):
        cache["pattern_grad", 0]

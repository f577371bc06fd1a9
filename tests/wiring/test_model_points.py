"""Every hook point of every family: it fires, with the shape of its name, and an edit reaches the logits."""

import pytest
import torch

from helpers.tiny import ALL_FAMILIES, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB
from helpers.wrapped import LAYERS, VISION_LAYERS, in_place, model_inputs, plain, returned, wrapped
from hooked_mllm.errors import HookValueError

BLOCK = [
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    *(f"attn.hook_{p}" for p in ("in", "q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")),
    "hook_attn_out",
    "hook_resid_mid",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
]
ENDS = ["hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_logits"]
VISION_ENDS = ["vision.hook_patch_embed", "vision.hook_out", "projector.hook_in", "projector.hook_out"]


def expected_names(family: str) -> set[str]:
    names = {*ENDS, *VISION_ENDS}
    names |= {f"blocks.{l}.{suffix}" for l in range(LAYERS) for suffix in (*BLOCK, "mlp.hook_pre_linear")}
    names |= {f"vision.blocks.{l}.{suffix}" for l in range(VISION_LAYERS) for suffix in BLOCK}
    if family.endswith("moe"):  # experts: no one hidden layer
        names -= {n for n in names if ".mlp." in n and not n.startswith("vision.") and not n.endswith("mlp.hook_in")}
    if family.startswith("qwen3_vl"):
        names |= {f"blocks.{l}.hook_deepstack" for l in range(2)}
    return names


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_the_names_are_one_grammar_for_all_families(name):
    names, expected = set(wrapped(name).hook_dict), expected_names(name)
    assert names <= expected, f"new names: add them to BLOCK or ENDS: {sorted(names - expected)}"
    assert names == expected


def shape_of(suffix: str, batch: int, pos: int, heads: int, kv_heads: int, d_head: int, width: int, mlp: int):
    return {
        "q": (batch, pos, heads, d_head),
        "k": (batch, pos, kv_heads, d_head),
        "v": (batch, pos, kv_heads, d_head),
        "rot_q": (batch, pos, heads, d_head),
        "rot_k": (batch, pos, kv_heads, d_head),
        "z": (batch, pos, heads, d_head),
        "result": (batch, pos, heads, width),
        "pattern": (batch, heads, pos, pos),
        "attn_scores": (batch, heads, pos, pos),
        "scale": (batch, pos, 1),
        "pre": (batch, pos, mlp),
        "pre_linear": (batch, pos, mlp),
        "post": (batch, pos, mlp),
        "logits": (batch, pos, VOCAB),
    }.get(suffix, (batch, pos, width))


@pytest.mark.parametrize("name", ALL_FAMILIES)
@torch.no_grad()
def test_every_point_fires_once_in_forward_order_with_the_shape_of_its_name(name):
    model, inputs, seen = wrapped(name), model_inputs(name, 2, 2), {}

    def note(x, hook):
        assert hook.name not in seen
        seen[hook.name] = tuple(x.shape)

    model.run_with_hooks(inputs, fwd_hooks=[("*", note)])
    assert set(seen) == set(model.hook_dict)
    text = [n for n in seen if not n.startswith(("vision.", "projector.")) and n != "hook_embed"]
    assert text == [n for n in model.hook_dict if n in text]
    batch, pos = inputs["input_ids"].shape
    for hook_name in text:
        suffix = hook_name.rpartition("hook_")[2]
        assert seen[hook_name] == shape_of(suffix, batch, pos, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, 48), hook_name
    tiles, patches = seen["vision.blocks.0.hook_resid_pre"][:2]
    assert (tiles == 1) == name.startswith("qwen3_vl")  # packed
    for hook_name in (n for n in seen if n.startswith("vision.blocks.")):
        suffix = hook_name.rpartition("hook_")[2]
        assert seen[hook_name] == shape_of(suffix, tiles, patches, 2, 2, 16, 32, 48), hook_name


@pytest.mark.parametrize("name", ALL_FAMILIES)
@torch.no_grad()
def test_every_edit_returned_or_in_place_reaches_the_logits(name):
    model, inputs = wrapped(name), model_inputs(name)
    base = model(inputs)
    # the mixture of experts has Qwen3-VL's own tower
    tried = [n for n in model.hook_dict if n.startswith("blocks.") or not name.endswith("moe")]
    for hook_name in tried:
        by_return = model.run_with_hooks(inputs, fwd_hooks=[(hook_name, returned(hook_name))])
        by_place = model.run_with_hooks(inputs, fwd_hooks=[(hook_name, in_place(hook_name))])
        assert (by_return - base).abs().max() > 1e-3, hook_name
        torch.testing.assert_close(by_place, by_return, atol=1e-5, rtol=1e-5, msg=hook_name)
    assert torch.equal(model(inputs), base)


@pytest.mark.parametrize("name", ALL_FAMILIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_identity_hooks_change_nothing(name, mode):
    model, inputs = wrapped(name), model_inputs(name, 2, 2)
    with mode():
        expected = plain(name)(**inputs).logits
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[("*", lambda x, hook: x)]), expected)
        assert torch.equal(model.run_with_hooks(inputs, fwd_hooks=[("*", lambda x, hook: None)]), expected)
        copied = model.run_with_hooks(inputs, fwd_hooks=[("*", lambda x, hook: x.clone())])
    torch.testing.assert_close(copied, expected, atol=1e-4, rtol=1e-4)  # norms and sums are then computed again


@torch.no_grad()
def test_edits_work_under_inference_mode_and_with_gradients_alike(family):
    model, inputs = wrapped(family), model_inputs(family)
    names = ["blocks.0.hook_resid_mid", "blocks.1.attn.hook_pattern", "vision.blocks.0.attn.hook_q", "hook_embed"]
    hooks = [(n, in_place(n)) for n in names]
    expected = model.run_with_hooks(inputs, fwd_hooks=hooks)
    with torch.inference_mode():
        torch.testing.assert_close(model.run_with_hooks(inputs, fwd_hooks=hooks), expected, atol=1e-5, rtol=1e-5)
    with torch.enable_grad():
        torch.testing.assert_close(
            model.run_with_hooks(inputs, fwd_hooks=hooks).detach(), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_every_point_keeps_the_models_dtype_and_takes_edits_of_it(family, dtype):
    model, inputs, seen = wrapped(family, "sdpa", dtype), model_inputs(family), {}
    expected = plain(family, "sdpa", dtype)(**inputs).logits
    got = model.run_with_hooks(inputs, fwd_hooks=[("*", lambda x, hook: seen.__setitem__(hook.name, x.dtype))])
    assert torch.equal(got, expected)
    exceptions = {n for n, d in seen.items() if d != dtype and not n.endswith("hook_scale")}
    assert exceptions == set()
    hooks = [("*hook_z", lambda z, hook: z * 0.5), ("*ln*", lambda x, hook: x * 1)]
    edited = model.run_with_hooks(inputs, fwd_hooks=hooks)
    assert edited.dtype == dtype and torch.isfinite(edited).all() and not torch.equal(edited, expected)


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_z", "vision.blocks.0.attn.hook_q", "ln_final.hook_normalized"])
@torch.no_grad()
def test_a_result_that_does_not_fit_is_rejected_by_name_and_leaves_no_hook(family, name):
    model, inputs = wrapped(family), model_inputs(family)
    for wrong, what in ((lambda x: x[:, 1:], "shape"), (lambda x: x.double(), "dtype")):
        with pytest.raises(HookValueError, match=f"{name} returned {what} .*; expected"):
            model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook, w=wrong: w(x))])
    assert model.list_hooks() == {}
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)

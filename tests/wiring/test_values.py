"""What the points hold, against torch hooks on the modules of an unwrapped model and against arithmetic by hand."""

import pytest
import torch
from torch import nn

from helpers.wrapped import LAYERS, model_inputs, noise, plain, wrapped

VISION_BLOCKS = {
    "qwen3_vl": "model.visual.blocks",
    "llava_onevision": "model.vision_tower.encoder.layers",
    "internvl": "model.vision_tower.encoder.layer",
}
TEXT = {  # suffix: module path in a decoder block, side, whether heads are folded
    "hook_resid_pre": ("", "in", False),
    "hook_attn_out": ("self_attn", "out", False),
    "hook_resid_mid": ("post_attention_layernorm", "in", False),
    "mlp.hook_pre": ("mlp.gate_proj", "out", False),
    "mlp.hook_pre_linear": ("mlp.up_proj", "out", False),
    "mlp.hook_post": ("mlp.down_proj", "in", False),
    "hook_mlp_out": ("mlp", "out", False),
    "hook_resid_post": ("", "out", False),
    "attn.hook_v": ("self_attn.v_proj", "out", True),
    "attn.hook_z": ("self_attn.o_proj", "in", True),
}
NORMED = {"attn.hook_q": ("self_attn.q_norm", "out", False), "attn.hook_k": ("self_attn.k_norm", "out", False)}
BARE = {"attn.hook_q": ("self_attn.q_proj", "out", True), "attn.hook_k": ("self_attn.k_proj", "out", True)}


def listen(module: nn.Module, side: str, fn):
    """A torch hook that hands a module's first input or output to `fn`, and puts back what that returns."""

    def pre(_, args, kwargs):
        got = fn(args[0] if args else kwargs["hidden_states"])
        if got is not None:
            return ((got, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": got})

    def post(_, args, output):
        got = fn(output[0] if isinstance(output, tuple) else output)
        if got is not None:
            return (got, *output[1:]) if isinstance(output, tuple) else got

    if side == "in":
        return module.register_forward_pre_hook(pre, with_kwargs=True)
    return module.register_forward_hook(post)


def witness(family, inputs, path, side, fn):
    """Logits of the unwrapped model with one torch hook."""
    model = plain(family)
    handle = listen(model.get_submodule(path), side, fn)
    try:
        return model(**inputs).logits
    finally:
        handle.remove()


def hooked_values(family, inputs, names="*"):
    seen = {}
    wrapped(family).run_with_hooks(inputs, fwd_hooks=[(names, lambda x, hook: seen.__setitem__(hook.name, x.clone()))])
    return seen


@torch.no_grad()
def test_text_points_hold_what_their_modules_take_and_give(family):
    inputs = model_inputs(family, 1, 2)
    seen = hooked_values(family, inputs, "blocks.1.*")
    for suffix, (path, side, folded) in {**TEXT, **(BARE if family == "llava_onevision" else NORMED)}.items():
        found, module = [], f"model.language_model.layers.1.{path}".rstrip(".")
        witness(family, inputs, module, side, lambda x, f=found: f.append(x.clone()))
        value = seen[f"blocks.1.{suffix}"]
        assert torch.equal(value.flatten(2) if folded else value, found[0]), suffix


@torch.no_grad()
def test_edits_at_text_modules_equal_the_same_edits_by_torch_hooks(family):
    inputs = model_inputs(family)
    for suffix, (path, side, folded) in {**TEXT, **(BARE if family == "llava_onevision" else NORMED)}.items():
        if suffix == "hook_resid_mid":
            continue  # no torch hook can edit it: the block adds to the tensor that the norm was given
        module = f"model.language_model.layers.1.{path}".rstrip(".")
        expected = witness(family, inputs, module, side, lambda x: x + 0.3 * noise(x))

        def fn(x, hook, folded=folded):
            return x + (0.3 * noise(x.flatten(2)).view_as(x) if folded else 0.3 * noise(x))

        got = wrapped(family).run_with_hooks(inputs, fwd_hooks=[(f"blocks.1.{suffix}", fn)])
        assert torch.equal(got, expected), suffix


@torch.no_grad()
def test_an_edit_of_resid_mid_moves_stream_and_mlp_alike(family):
    """The same constant added to attention's output by an unwrapped model gives the same stream."""
    inputs = model_inputs(family)
    expected = witness(family, inputs, "model.language_model.layers.1.self_attn", "out", lambda x: x + noise(x))
    got = wrapped(family).run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: x + noise(x))])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "vision."])
@torch.no_grad()
def test_the_stream_adds_up_within_a_block(family, prefix):
    seen = hooked_values(family, model_inputs(family, 2))
    for layer in range(2):
        names = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        pre, attn_out, mid, mlp_out, post = (seen[f"{prefix}blocks.{layer}.hook_{n}"] for n in names)
        torch.testing.assert_close(mid, pre + attn_out)
        torch.testing.assert_close(post, mid + mlp_out)
        if prefix:
            following = f"vision.blocks.{layer + 1}.hook_resid_pre" if layer == 0 else "vision.hook_out"
            if family != "internvl" or layer == 0:  # InternVL's tower may end in a norm
                torch.testing.assert_close(seen[following], post)


@pytest.mark.parametrize("gain", ["attn_out", "mlp_out"])
@torch.no_grad()
def test_layer_scale_is_part_of_what_a_block_of_internvl_adds(gain):
    inputs, path = model_inputs("internvl"), "model.vision_tower.encoder.layer.1."
    block = plain("internvl").get_submodule(path[:-1])
    scale, module = (block.lambda_1, "attention") if gain == "attn_out" else (block.lambda_2, "mlp")
    found = []
    witness("internvl", inputs, path + module, "out", lambda x: found.append(x.clone()))
    name = f"vision.blocks.1.hook_{gain}"
    torch.testing.assert_close(hooked_values("internvl", inputs, name)[name], scale * found[0])
    expected = witness("internvl", inputs, path + module, "out", lambda x: x + noise(x) / scale)
    got = wrapped("internvl").run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x + noise(x))])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_deepstack_is_what_is_added_between_two_blocks_and_only_on_images():
    inputs = model_inputs("qwen3_vl", 2, 2)
    seen = hooked_values("qwen3_vl", inputs, "blocks.*")
    visual = inputs["input_ids"] == plain("qwen3_vl").config.image_token_id
    for layer in range(LAYERS - 1):
        post, pre = seen[f"blocks.{layer}.hook_resid_post"], seen[f"blocks.{layer + 1}.hook_resid_pre"]
        added = seen[f"blocks.{layer}.hook_deepstack"]
        torch.testing.assert_close(post + added, pre)
        assert (added[visual].abs().amax(-1) > 0).all() and (added[~visual] == 0).all()


@torch.no_grad()
def test_embed_holds_the_projected_image_at_its_places(family):
    inputs, seen = model_inputs(family), hooked_values(family, model_inputs(family))
    model = plain(family)
    visual = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(seen["hook_embed"][~visual], model.get_input_embeddings()(inputs["input_ids"])[~visual])
    assert torch.equal(seen["hook_embed"], seen["blocks.0.hook_resid_pre"])
    if family != "llava_onevision":  # which packs views and adds newlines after its projector
        torch.testing.assert_close(seen["hook_embed"][visual], seen["projector.hook_out"].reshape(-1, 32))


@pytest.mark.parametrize("point", ["ln1", "ln2", "vision.ln1", "ln_final"])
@torch.no_grad()
def test_norms_by_hand(family, point):
    inputs = model_inputs(family)
    prefix = "ln_final." if point == "ln_final" else "vision." * point.startswith("v") + f"blocks.1.{point[-3:]}."
    paths = {
        "ln1": "model.language_model.layers.1.input_layernorm",
        "ln2": "model.language_model.layers.1.post_attention_layernorm",
        "ln_final": "model.language_model.norm",
        "vision.ln1": VISION_BLOCKS[family]
        + ".1."
        + {"qwen3_vl": "norm1", "llava_onevision": "layer_norm1", "internvl": "layernorm_before"}[family],
    }
    norm = plain(family).get_submodule(paths[point])
    took, gave = [], []
    witness(family, inputs, paths[point], "in", lambda x: took.append(x.clone()))
    witness(family, inputs, paths[point], "out", lambda x: gave.append(x.clone()))
    x, layer_norm = took[0].double(), isinstance(norm, nn.LayerNorm)
    x = x - x.mean(-1, keepdim=True) if layer_norm else x
    scale = (x.pow(2).mean(-1, keepdim=True) + (norm.eps if layer_norm else norm.variance_epsilon)).sqrt()
    hooked = hooked_values(family, inputs, prefix + "*")
    seen = {n: v.reshape(*took[0].shape[:-1], -1).double() for n, v in hooked.items()}
    torch.testing.assert_close(seen[prefix + "hook_scale"], scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[prefix + "hook_normalized"], x / scale, atol=1e-5, rtol=1e-5)
    # twice the scale, or half the normalised input: half the norm's output, but for a bias
    bias = norm.bias if layer_norm else 0.0
    expected = witness(family, inputs, paths[point], "out", lambda y: (y - bias) / 2 + bias)
    for name, fn in (("hook_scale", lambda s, hook: s * 2), ("hook_normalized", lambda y, hook: y / 2)):
        got = wrapped(family).run_with_hooks(inputs, fwd_hooks=[(prefix + name, fn)])
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["", "vision."])
@torch.no_grad()
def test_head_results_add_up_to_the_attention_output(family, prefix):
    inputs, seen = model_inputs(family), hooked_values(family, model_inputs(family))
    blocks = "model.language_model.layers" if not prefix else VISION_BLOCKS[family]
    block = plain(family).get_submodule(f"{blocks}.1")
    projections = ("self_attn.o_proj", "attn.proj", "self_attn.out_proj", "attention.projection_layer")
    o = next(m for n, m in block.named_modules() if n in projections)
    total = seen[f"{prefix}blocks.1.attn.hook_result"].sum(-2)
    total = total if o.bias is None else total + o.bias
    gain = getattr(block, "lambda_1", 1.0)
    torch.testing.assert_close(gain * total, seen[f"{prefix}blocks.1.hook_attn_out"], atol=1e-5, rtol=1e-4)
    # one head's result taken away is that head's z taken away
    hooks = ([(f"{prefix}blocks.1.attn.hook_{p}", lambda x, hook: drop_head(x))] for p in ("result", "z"))
    results, zs = (wrapped(family).run_with_hooks(inputs, fwd_hooks=h) for h in hooks)
    torch.testing.assert_close(results, zs, atol=1e-4, rtol=1e-4)


def drop_head(x):
    out = x.clone()
    out[:, :, 1] = 0
    return out

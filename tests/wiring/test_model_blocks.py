"""What the points hold, against torch hooks on the modules of an unwrapped model and against arithmetic by hand."""

import pytest
import torch

from helpers.module_witness import hooked_values, witness
from helpers.wrapped import model_inputs, noise, plain, wrapped

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


@torch.no_grad()
def test_embed_holds_the_projected_image_at_its_places(family):
    inputs, seen = model_inputs(family), hooked_values(family, model_inputs(family))
    model = plain(family)
    visual = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(seen["hook_embed"][~visual], model.get_input_embeddings()(inputs["input_ids"])[~visual])
    assert torch.equal(seen["hook_embed"], seen["blocks.0.hook_resid_pre"])
    if family != "llava_onevision":  # which packs views and adds newlines after its projector
        torch.testing.assert_close(seen["hook_embed"][visual], seen["projector.hook_out"].reshape(-1, 32))

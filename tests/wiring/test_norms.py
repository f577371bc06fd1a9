"""Scale, normalised input and output of norms, against the formulas in float64 and what the next modules take."""

import pytest
import torch
from torch import nn

from helpers.module_witness import VISION_BLOCKS, hooked_values, listen, witness
from helpers.wrapped import model_inputs, plain, wrapped


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


#: the modules that take what attention or the MLP takes, in block 1 of each tower
TAKERS = {
    "blocks.1.attn.hook_in": dict.fromkeys(VISION_BLOCKS, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "blocks.1.mlp.hook_in": dict.fromkeys(VISION_BLOCKS, ("mlp.gate_proj", "mlp.up_proj")),
    "vision.blocks.1.attn.hook_in": {
        "qwen3_vl": ("attn.qkv",),
        "llava_onevision": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "internvl": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    },
    "vision.blocks.1.mlp.hook_in": {
        "qwen3_vl": ("mlp.linear_fc1",),
        "llava_onevision": ("mlp.fc1",),
        "internvl": ("mlp.fc1",),
    },
}


@pytest.mark.parametrize("point", TAKERS)
@torch.no_grad()
def test_what_attention_and_the_mlp_take_is_one_point_and_an_edit_reaches_each_of_their_projections(family, point):
    inputs, model = model_inputs(family), plain(family)
    blocks = VISION_BLOCKS[family] if point.startswith("vision") else "model.language_model.layers"
    modules = [model.get_submodule(f"{blocks}.1.{path}") for path in TAKERS[point][family]]
    took = []
    handles = [listen(module, "in", lambda x: took.append(x.clone())) for module in modules]
    handles += [listen(module, "in", lambda x: x * 2) for module in modules]
    expected = model(**inputs).logits
    for handle in handles:
        handle.remove()
    seen = hooked_values(family, inputs, point)[point]
    assert len(took) == len(modules)
    for x in took:
        assert torch.equal(seen.reshape(x.shape), x)
    for edit in (lambda x, hook: x * 2, lambda x, hook: x.mul_(2)):
        got = wrapped(family).run_with_hooks(inputs, fwd_hooks=[(point, edit)])
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert (expected - model(**inputs).logits).abs().max() > 0.01
    # the gain and the bias are behind hook_normalized: it is not this output
    normalized = point.replace("attn.hook_in", "ln1.hook_normalized").replace("mlp.hook_in", "ln2.hook_normalized")
    assert (hooked_values(family, inputs, normalized)[normalized] - seen).abs().max() > 0.01

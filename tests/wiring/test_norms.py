"""Scale and normalised input of norms against the formulas in float64."""

import pytest
import torch
from torch import nn

from helpers.module_witness import VISION_BLOCKS, hooked_values, witness
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

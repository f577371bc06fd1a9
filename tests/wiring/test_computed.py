"""Activations that no module takes or returns, against the same edits by torch hooks."""

import pytest
import torch

from helpers.module_witness import hooked_values, witness
from helpers.wrapped import model_inputs, noise, plain, wrapped


@torch.no_grad()
def test_an_edit_of_resid_mid_moves_stream_and_mlp_alike(family):
    """The same constant added to attention's output by an unwrapped model gives the same stream."""
    inputs = model_inputs(family)
    expected = witness(family, inputs, "model.language_model.layers.1.self_attn", "out", lambda x: x + noise(x))
    got = wrapped(family).run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_resid_mid", lambda x, hook: x + noise(x))])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


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

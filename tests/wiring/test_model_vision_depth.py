"""Blocks of the vision tower behind the feature layer run for nothing: they have no hook points, so no edit is lost."""

import pytest
import torch

from helpers.wrapped import VISION_LAYERS, fresh, model_inputs
from hooked_mllm import HookedMLLM, HookNameError


@pytest.fixture(params=["llava_onevision", "internvl"])
def early(request):
    """A model that takes the features one block before the tower's end."""
    hf = fresh(request.param)
    hf.config.vision_feature_layer = -2
    return HookedMLLM.from_model(hf, check=False), model_inputs(request.param)


def test_a_block_behind_the_features_has_no_points(early):
    model, _ = early
    assert model.cfg.vision_n_layers == VISION_LAYERS - 1
    with pytest.raises(HookNameError, match=r"vision.blocks.1.attn.hook_z"):
        model.add_hook("vision.blocks.1.attn.hook_z", lambda z, hook: None)


def test_what_has_points_is_seen_and_an_edit_reaches_the_logits(early):
    model, inputs = early
    plain = model(inputs)
    logits, cache = model.run_with_cache(inputs)
    assert torch.equal(plain, logits)
    assert cache["vision", "pattern", -1].sum(-1).allclose(torch.ones(()), atol=1e-5)
    for name in (n for n in model.hook_dict if n.startswith("vision.")):
        edited = model.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x * 1.5 + 0.1)])
        assert not torch.equal(edited, plain), name
    assert torch.equal(model(inputs), plain)

"""DeepStack: what is added between two blocks, and where it takes no edit."""

import pytest
import torch

from helpers.module_witness import hooked_values
from helpers.wrapped import LAYERS, model_inputs, plain, wrapped
from hooked_mllm.errors import HookNameError, HookValueError


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


def test_deepstack_takes_no_edit_off_the_image():
    model, inputs = wrapped("qwen3_vl"), model_inputs("qwen3_vl")
    hooks = [("blocks.0.hook_deepstack", lambda x, hook: x + 1)]
    with pytest.raises(HookValueError, match="positions that hold no visual token.*edit blocks.0.hook_resid_post"):
        model.run_with_hooks(inputs, fwd_hooks=hooks)
    assert torch.equal(model(inputs), plain("qwen3_vl")(**inputs).logits)


@torch.no_grad()
def test_deepstack_is_silent_without_an_image_and_in_decoding():
    model, steps = wrapped("qwen3_vl"), []
    hooks = [("*hook_deepstack", lambda x, hook: steps.append((hook.name, hook.step)))]
    text = {"input_ids": torch.arange(20, 30)[None], "attention_mask": torch.ones(1, 10, dtype=torch.long)}
    model.run_with_hooks(text, fwd_hooks=hooks)
    assert steps == []
    with model.hooks(hooks):
        model.generate(model_inputs("qwen3_vl"), max_new_tokens=3, do_sample=False)
    assert steps == [("blocks.0.hook_deepstack", 0), ("blocks.1.hook_deepstack", 0)]


def test_a_family_without_deepstack_names_what_it_has():
    with pytest.raises(HookNameError, match="InternVL.* has no hook point 'blocks.0.hook_deepstack'. Did you mean"):
        wrapped("internvl").add_hook("blocks.0.hook_deepstack", lambda x, hook: None)

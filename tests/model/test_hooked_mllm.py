"""Sizes, facts and devices of a wrapped model."""

import pytest
import torch
from accelerate import dispatch_model

from helpers.tiny import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, tiny_image, tiny_processor
from helpers.wrapped import LAYERS, VISION_LAYERS, fresh, model_inputs, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError


def test_sizes_and_facts(family):
    model, cfg = wrapped(family), wrapped(family).cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_model, cfg.d_head) == (
        LAYERS,
        HEADS,
        KV_HEADS,
        HIDDEN,
        HEAD_DIM,
    )
    assert (cfg.d_mlp, cfg.d_vocab, cfg.vision_n_layers, cfg.vision_n_heads, cfg.vision_d_model, cfg.vision_d_head) == (
        48,
        VOCAB,
        VISION_LAYERS,
        2,
        32,
        16,
    )
    assert cfg.n_deepstack == (2 if family == "qwen3_vl" else 0)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.info.attention == "sdpa" and model.info.n_kv_heads == KV_HEADS
    with model.hooks([("*hook_z", lambda z, hook: None)]):
        assert model.info.attention == "sdpa"  # what the model runs, hooked or not
    assert type(model.hf_model).__name__ in repr(model) and "3 layers x 4 heads (2 key-value)" in repr(model)


def test_unembed_takes_ids_and_words(family):
    model = wrapped(family)
    weight = model.hf_model.lm_head.weight
    assert torch.equal(model.unembed(7, 2), weight[[7, 7]])
    assert torch.equal(model.unembed([7, 9], 2), weight[[7, 9]])
    assert torch.equal(model.unembed(torch.tensor([7, 9]), 2), weight[[7, 9]])
    token = model.processor.tokenizer.encode("the", add_special_tokens=False)
    assert len(token) == 1 and torch.equal(model.unembed("the", 1), weight[token])
    for tokens, message in (
        ("What colour is the mug?", r"is \d+ tokens; expected one"),
        ([1, 2, 3], "one for each of 2 samples; got 3"),
        (VOCAB, "outside the vocabulary"),
        (-1, "outside the vocabulary"),
    ):
        with pytest.raises(InputError, match=message):
            model.unembed(tokens, 2)


def test_without_a_processor_everything_but_prepare_works(family):
    model = HookedMLLM.from_model(fresh(family))
    assert torch.equal(model(model_inputs(family)), plain(family)(**model_inputs(family)).logits)
    with pytest.raises(InputError, match="processor"):
        model.prepare("What is this?", images=tiny_image())
    with pytest.raises(InputError, match="needs a processor; give its id"):
        model.unembed("the", 1)


def test_to_moves_and_casts(family):
    model = HookedMLLM.from_model(fresh(family), tiny_processor(family), check=False)
    assert model.to(torch.bfloat16) is model and model.dtype == torch.bfloat16
    inputs = model_inputs(family)
    assert torch.equal(model(inputs), plain(family, "sdpa", torch.bfloat16)(**inputs).logits)


@torch.no_grad()
def test_a_model_spread_by_accelerate_works_and_stays_where_it_is(family):
    """Every module carries accelerate's hooks, as on several devices, though here all of them are one."""
    hf = fresh(family)
    parts = {"model": "cpu", "lm_head": "cpu"}
    model = HookedMLLM.from_model(dispatch_model(hf, device_map=parts, force_hooks=True), tiny_processor(family))
    inputs = model_inputs(family)
    hooks = [("*hook_z", lambda z, hook: z * 0.5), ("*hook_resid_mid", lambda x, hook: x * 2)]
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)
    assert torch.equal(
        model.run_with_hooks(inputs, fwd_hooks=hooks), wrapped(family).run_with_hooks(inputs, fwd_hooks=hooks)
    )
    with pytest.raises(InputError, match="spread by device_map"):
        model.to("cpu")

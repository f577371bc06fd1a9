"""The residual stream comes apart without a remainder, at visual positions and under DeepStack too."""

import pytest
import torch

from helpers.cache_witness import batch, close, film, hooked, sample, text_sample
from helpers.tiny import tiny_image
from hooked_mllm.errors import HookNameError, HookValueError, LayoutError

MAKES = [sample, batch, film, text_sample]


def entering(cache, layer: int):
    """The stream entering a block, or the final norm."""
    return cache["resid_pre", layer] if layer < 3 else cache.accumulated_resid()[-1]


@pytest.mark.parametrize("make", MAKES)
def test_terms_sum_to_the_stream_at_every_layer_and_every_position(family, make):
    model, inputs = hooked(family), make(family)
    _, cache = model.run_with_cache(inputs)
    for layer in range(4):
        stack, labels = cache.decompose_resid(layer, return_labels=True)
        close(stack.sum(0), entering(cache, layer))
        assert len(labels) == len(stack)
    close(cache.decompose_resid().sum(0), cache.decompose_resid(3).sum(0), 0)
    close(cache.decompose_resid(-1).sum(0), entering(cache, 3), 0)  # the end, as in TransformerLens
    if make is not text_sample:
        visual = _visual(inputs)
        embed, image = stack[labels.index("embed")], stack[labels.index("visual")]
        assert not embed[visual].any() and not image[~visual].any()
        assert embed[~visual].abs().sum() > 0 and image[visual].abs().sum() > 0
        deepstack = [i for i, label in enumerate(labels) if label.endswith("deepstack")]
        assert len(deepstack) == (2 if family == "qwen3_vl" else 0)
        for i in deepstack:
            assert not stack[i][~visual].any() and stack[i][visual].abs().sum() > 0


def _visual(inputs):
    return inputs.mask("visual")


def test_in_double_precision_nothing_is_lost(family):
    model = hooked(family, dtype=torch.float64)
    _, cache = model.run_with_cache(film(family).to(dtype=torch.float64))
    for layer in range(1, 4):
        error = (cache.decompose_resid(layer).sum(0) - entering(cache, layer)).abs().max()
        assert error < 1e-10, layer
        heads = cache.stack_head_results(layer, incl_remainder=True).sum(0) - entering(cache, layer)
        assert heads.abs().max() < 1e-10


def test_modes_and_labels(family):
    _, cache = hooked(family).run_with_cache(sample(family))
    deepstack = family == "qwen3_vl"
    _, labels = cache.decompose_resid(2, return_labels=True)
    blocks = [[f"{i}_attn_out", f"{i}_mlp_out", *([f"{i}_deepstack"] if deepstack else [])] for i in range(2)]
    assert labels == ["embed", "visual", *blocks[0], *blocks[1]]
    for mode, name in (("attn", "attn_out"), ("mlp", "mlp_out")):
        stack, labels = cache.decompose_resid(mode=mode, incl_embeds=False, return_labels=True)
        assert labels == [f"{i}_{name}" for i in range(3)]
        assert all(torch.equal(term, cache[name, i]) for i, term in enumerate(stack))
    with pytest.raises(HookValueError, match="mode"):
        cache.decompose_resid(mode="heads")


def test_accumulated_stream(family):
    _, cache = hooked(family).run_with_cache(sample(family))
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    for label, term in zip(labels[:-1], stack, strict=False):
        assert torch.equal(term, cache[f"resid_{label[2:]}", int(label[0])])
    assert torch.equal(stack[-1], cache["resid_post", 2])  # no DeepStack behind the last block
    part, labels = cache.accumulated_resid(1, incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre"] and torch.equal(part, stack[:3])
    normed = cache.accumulated_resid(apply_ln=True)
    close(normed[-1], hooked(family).ln_final(stack[-1]), 0)


def test_deepstack_behind_every_block_reaches_the_end():
    model = hooked("qwen3_vl", layers=2)
    _, cache = model.run_with_cache(sample("qwen3_vl"))
    assert model.cfg.n_deepstack == model.cfg.n_layers == 2
    final = cache.accumulated_resid()[-1]
    assert not torch.equal(final, cache["resid_post", 1])
    close(model.lm_head(model.ln_final(final)), cache["logits"])
    close(cache.decompose_resid().sum(0), final)
    close(cache.logit_lens(slice(None))[-1], cache["logits"])


@pytest.mark.parametrize("make", [sample, batch, film])
def test_heads_and_a_remainder_sum_to_the_stream(family, make):
    model = hooked(family)
    _, cache = model.run_with_cache(make(family))
    for layer in (1, 3):
        stack, labels = cache.stack_head_results(layer, incl_remainder=True, return_labels=True)
        assert labels == [f"L{i}H{h}" for i in range(layer) for h in range(4)] + ["remainder"]
        close(stack.sum(0), entering(cache, layer))
        for i, h in ((0, 0), (layer - 1, 3)):
            close(stack[labels.index(f"L{i}H{h}")], cache["result", i][:, :, h], 1e-6)
    _, z = model.run_with_cache(make(family), "blocks.*hook_z")
    close(z.stack_head_results(), cache.stack_head_results())
    bias = [model.output_projection(i).bias for i in range(3)]
    mlps = cache.decompose_resid(mode="mlp", incl_embeds=True).sum(0)
    rest = mlps + sum(b for b in bias if b is not None)
    if family == "qwen3_vl":
        rest = rest + cache["deepstack", 0] + cache["deepstack", 1]
    close(cache.stack_head_results(incl_remainder=True)[-1], rest, 1e-4)


def test_one_kind_of_activation_of_all_layers(family):
    _, cache = hooked(family).run_with_cache(sample(family))
    for name, part in (("z", None), ("pattern", None), ("scale", "ln2"), ("resid_mid", None)):
        key = (part,) if part else ()
        stack = cache.stack_activation(name, part=part)
        assert torch.equal(stack, torch.stack([cache[(name, i, *key)] for i in range(3)]))
    assert len(cache.stack_activation("z", 2)) == 2 and len(cache.stack_activation("z", -1)) == 3
    assert torch.equal(cache.stack_head_results(-1), cache.stack_head_results())


def test_a_norm_on_terms_is_linear(family):
    model = hooked(family)
    _, cache = model.run_with_cache(sample(family))
    scaled = cache.decompose_resid(apply_ln=True)
    close(scaled.sum(0), model.ln_final(entering(cache, 3)))
    close(model.lm_head(scaled.sum(0)), cache["logits"], 1e-4)
    close(cache.stack_head_results(incl_remainder=True, apply_ln=True).sum(0), scaled.sum(0))
    part = model.run_with_cache(sample(family), "*resid_*")[1]  # without the cached scale
    close(part.apply_ln_to_stack(cache.decompose_resid()), scaled)
    for layer in (0, 1, 2):  # as the norm of that block scales what enters it
        stack = cache.decompose_resid(layer)
        taken = model.hf_model.model.language_model.layers[layer].input_layernorm(entering(cache, layer))
        close(cache.apply_ln_to_stack(stack, layer).sum(0), taken)
        close(part.apply_ln_to_stack(stack, layer), cache.apply_ln_to_stack(stack, layer))
        close(cache.decompose_resid(layer, apply_ln=True).sum(0), taken)
        close(cache.accumulated_resid(layer, apply_ln=True)[-1], taken)
        if layer:
            close(cache.stack_head_results(layer, incl_remainder=True, apply_ln=True).sum(0), taken)


def test_under_an_edit_the_terms_still_sum(family):
    model = hooked(family)
    with model.hooks(
        [("blocks.1.attn.hook_z", lambda z, hook: z * 0), ("blocks.0.hook_mlp_out", lambda m, hook: m + 1)]
    ):
        _, cache = model.run_with_cache(film(family))
    close(cache.decompose_resid().sum(0), entering(cache, 3))
    assert not cache["result", 1].any()


def test_of_one_sample_of_a_batch(family):
    _, cache = hooked(family).run_with_cache(batch(family))
    for b in range(2):
        one = cache.sample(b)
        close(one.decompose_resid().sum(0), entering(cache, 3)[[b]])
        close(one.logit_lens()[-1], cache.logit_lens()[-1][[b]])


def test_what_is_missing_is_named(family):
    model, inputs = hooked(family), sample(family)
    _, cache = model.run_with_cache(inputs, ["blocks.*hook_attn_out", "hook_embed"])
    with pytest.raises(HookNameError, match=r"mlp_out.*names_filter"):
        cache.decompose_resid()
    with pytest.raises(HookNameError, match=r"'z', 0.*names_filter"):
        cache.stack_head_results()
    with pytest.raises(HookNameError, match="resid_pre"):
        cache.logit_lens()
    with pytest.raises(HookValueError, match="positions"):
        model.run_with_cache(inputs, pos_slice=[0, 1])[1].decompose_resid()
    _, full = model.run_with_cache(inputs)
    for wrong in (4, -4, -2):
        with pytest.raises(HookNameError, match="3 blocks.*None or -1 for the end"):
            full.accumulated_resid(wrong)
    for call in (full.stack_head_results, full.stack_activation):
        with pytest.raises(HookValueError, match="layer 0"):
            call(layer=0) if call == full.stack_head_results else call("z", 0)
    with pytest.raises(HookValueError, match="embeddings"):
        full.decompose_resid(0, incl_embeds=False)
    with pytest.raises(LayoutError):
        full.logit_lens(9999)


def test_bare_model_inputs_are_separated_too(family):
    _, cache = hooked(family).run_with_cache(dict(film(family).inputs))
    close(cache.decompose_resid().sum(0), entering(cache, 3))
    close(cache.logit_lens()[-1, :, 0], cache["logits"][:, -1])


def test_a_batch_in_which_one_sample_has_no_picture(family):
    model = hooked(family)
    inputs = model.prepare(["What colour is the mug?"] * 2, images=[[tiny_image()], []])
    logits, cache = model.run_with_cache(inputs)
    close(cache.decompose_resid().sum(0), entering(cache, 3))
    visual = torch.isin(inputs.inputs["input_ids"], torch.tensor(model.family.visual_token_ids(model.hf_model.config)))
    assert visual[0].any() and not visual[1].any()
    assert not cache.decompose_resid()[1][~visual].any()
    close(cache.logit_lens()[-1, :, 0], logits[inputs.mask("last")])

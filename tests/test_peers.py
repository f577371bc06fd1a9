"""What other interpretability toolkits fail at on multimodal models, one test a failure, for all three families."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from helpers.eager_reference import Reference
from helpers.tiny import tiny_config, tiny_image, tiny_processor
from helpers.wrapped import LAYERS, VISION_LAYERS, edit, fresh, in_place, model_inputs, noise, plain, returned, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
PER_HEAD = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z", "result")


def close(a, b, atol=2e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.fixture
def sample(family):
    return wrapped(family).prepare("What colour is the mug?", images=tiny_image(), answer="red")


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [returned, in_place])
@pytest.mark.parametrize("point", ["pattern", "attn_scores"])
@pytest.mark.parametrize("tower", ["text", "vision"])
@torch.no_grad()
def test_edits_of_pattern_and_scores_take_effect_exactly(family, tower, point, way):
    inputs, name = model_inputs(family), f"{'vision.' if tower == 'vision' else ''}blocks.1.attn.hook_{point}"
    got = wrapped(family).run_with_hooks(inputs, fwd_hooks=[(name, way(name))])
    close(got, Reference(family)(inputs, {(tower, 1, point): edit(name)}))
    assert (got - plain(family)(**inputs).logits).abs().max() > 0.01


@torch.no_grad()
def test_attn_scores_are_what_goes_into_the_softmax(family, sample):
    _, cache = wrapped(family).run_with_cache(sample)
    q, k = cache["rot_q", 1], cache["rot_k", 1].repeat_interleave(2, dim=2)
    by_hand = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    past = torch.ones(len(sample), len(sample)).tril().bool()
    scores = cache["attn_scores", 1]
    close(scores[..., past], by_hand[..., past], 1e-5)
    assert (scores[..., ~past] < -1e30).all()
    close(scores.softmax(-1), cache["pattern", 1], 1e-6)


@torch.no_grad()
def test_the_pattern_is_transformers_own_without_running_eager_attention(family, sample):
    model, expected = wrapped(family), plain(family, "eager")(**sample.inputs, output_attentions=True).attentions
    _, cache = model.run_with_cache(sample)
    for layer in range(LAYERS):
        torch.testing.assert_close(cache["pattern", layer], expected[layer], atol=1e-5, rtol=0)
    assert model.hf_model.config.text_config._attn_implementation == "sdpa"


def test_pattern_and_z_have_gradients(family, sample):
    names = [f"{t}blocks.1.attn.hook_{p}" for t in ("", "vision.") for p in ("pattern", "z")]
    _, cache = wrapped(family).run_with_cache(sample, names_filter=names, incl_bwd=True)
    assert all(cache[n + "_grad"].abs().max() > 0 and cache[n + "_grad"].shape == cache[n].shape for n in names)


@torch.no_grad()
def test_head_results_are_there_and_sum_to_the_attention_output(family, sample):
    _, cache = wrapped(family).run_with_cache(sample)
    for layer in range(LAYERS):
        close(cache["result", layer].sum(2), cache["attn_out", layer], 1e-5)


@torch.no_grad()
def test_one_heads_query_may_come_from_another_stream_than_its_keys(family):
    """What a split of the attention's input per head is for."""
    inputs, model, other = model_inputs(family), wrapped(family), {}
    q, resid = "blocks.1.attn.hook_q", "blocks.1.hook_resid_pre"
    model.run_with_hooks(inputs, fwd_hooks=[(resid, returned(resid)), (q, lambda x, hook: other.update(q=x.clone()))])
    patterns = {}

    def one_head(x, hook):
        x[:, :, 1] = other["q"][:, :, 1]

    for label, hooks in (("plain", []), ("split", [(q, one_head)])):
        keep = ("blocks.1.attn.hook_pattern", lambda x, hook, n=label: patterns.update({n: x.clone()}))
        model.run_with_hooks(inputs, fwd_hooks=[*hooks, keep])
    changed = (patterns["split"] - patterns["plain"]).abs().amax((0, 2, 3))
    assert changed[1] > 0.01 and changed[[0, 2, 3]].max() < 1e-6


# -- the vision tower --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_vision_heads_are_read_and_edited_under_the_names_of_the_text_model(family):
    inputs, model = model_inputs(family, 2), wrapped(family)
    base, cache = model.run_with_cache(inputs)
    for layer in range(VISION_LAYERS):
        for point in PER_HEAD:
            name = f"vision.blocks.{layer}.attn.hook_{point}"
            heads = 1 if point in ("pattern", "attn_scores") else 2
            assert cache["vision", point, layer].shape[heads] == 2, name

            def one_head(x, hook, axis=heads):
                x.select(axis, 1).add_(0.5 * noise(x.select(axis, 1)))

            assert (model.run_with_hooks(inputs, fwd_hooks=[(name, one_head)]) - base).abs().max() > 1e-3, name


def test_vision_names_are_the_same_for_all_families():
    names = [
        [n for n in wrapped(f).hook_dict if n.startswith(("vision.", "projector."))]
        for f in ("qwen3_vl", "llava_onevision", "internvl")
    ]
    assert names[0] == names[1] == names[2] and len(names[0]) > 40


@pytest.mark.parametrize("way", [returned, in_place])
@torch.no_grad()
def test_what_leaves_the_tower_can_be_edited(family, way):
    """Also the last block's output, which transformers collects with hooks of its own."""
    inputs, model = model_inputs(family), wrapped(family)
    last = f"vision.blocks.{VISION_LAYERS - 1}.hook_resid_post"
    names = ["vision.hook_out", last, "projector.hook_in", "projector.hook_out"]
    for name in names:
        got = model.run_with_hooks(inputs, fwd_hooks=[(name, way(name))])
        assert (got - plain(family)(**inputs).logits).abs().max() > 0.01, name
    # nothing lies between the tower's last block and its end but, for InternVL, a norm
    if family != "internvl":
        ends = [model.run_with_hooks(inputs, fwd_hooks=[(n, lambda x, hook: x * 1.5)]) for n in names[:2]]
        close(ends[0], ends[1])


@torch.no_grad()
def test_no_registered_point_stays_silent(family, sample):
    model = wrapped(family)
    _, cache = model.run_with_cache(sample)
    assert set(cache) == set(model.hook_dict)


# -- the residual stream -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_stream_between_blocks_is_accounted_for_at_visual_positions(family, sample):
    _, cache = wrapped(family).run_with_cache(sample)
    assert torch.equal(cache["embed"], cache["resid_pre", 0])
    for layer in range(LAYERS - 1):
        added = cache["deepstack", layer] if ("deepstack", layer) in cache else 0
        close(cache["resid_post", layer] + added, cache["resid_pre", layer + 1], 1e-6)


@torch.no_grad()
def test_decompositions_sum_to_the_stream_at_every_position(family, sample):
    _, cache = wrapped(family).run_with_cache(sample)
    for layer in (*range(LAYERS), None):
        whole = cache["resid_post", -1] if layer is None else cache["resid_pre", layer]
        parts, labels = cache.decompose_resid(layer, return_labels=True)
        close(parts.sum(0), whole, 1e-5)
        assert labels[:2] == ["embed", "visual"]
        assert ("0_deepstack" in labels) == (family == "qwen3_vl" and layer != 0)


@torch.no_grad()
def test_stopping_at_the_first_block_gives_the_stream_with_the_image_in_it(family, sample):
    model = wrapped(family)
    stream = model(sample, stop_at_layer=0)
    visual = sample.mask("visual")[0]
    embedding = model.hf_model.get_input_embeddings()(sample.inputs["input_ids"])
    assert torch.equal(stream[:, ~visual], embedding[:, ~visual])
    assert (stream[:, visual] - embedding[:, visual]).abs().amax(-1).min() > 1e-3


def test_starting_in_the_middle_is_rejected(family, sample):
    with pytest.raises(InputError, match="takes no argument 'start_at_layer' and would ignore it"):
        wrapped(family)(sample, start_at_layer=1)


# -- generation and inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_with_images_is_right_with_a_cache_and_without(family, use_cache):
    inputs = model_inputs(family, 2)
    expected = plain(family).generate(**inputs, use_cache=use_cache, **GREEDY)
    assert torch.equal(wrapped(family).generate(inputs, use_cache=use_cache, **GREEDY), expected)


def test_a_generation_with_images_can_be_cached_step_by_step(family, sample):
    model = wrapped(family)
    tokens, cache = model.run_with_cache(sample, names_filter="*hook_z", generate=GREEDY)
    assert torch.equal(tokens, plain(family).generate(**sample.inputs, **GREEDY))
    assert [step["z", 1].shape[1] for step in cache] == [len(sample), 1, 1, 1, 1]


@torch.no_grad()
def test_visual_tokens_without_pixels_do_not_run(family):
    bare = {k: v for k, v in model_inputs(family).items() if k != "pixel_values"}
    plain(family)(**bare)  # transformers runs it without a warning
    for call in (wrapped(family), wrapped(family).generate):
        with pytest.raises(InputError, match="visual tokens .* but no `pixel_values` came with it"):
            call(bare)


@torch.no_grad()
def test_what_the_processor_returns_goes_in_as_it_is(family):
    inputs = model_inputs(family)
    assert torch.equal(wrapped(family)(**inputs), plain(family)(**inputs).logits)
    assert torch.equal(wrapped(family)(inputs), plain(family)(**inputs).logits)


@pytest.mark.parametrize("point", ["z", "pattern"])
@torch.no_grad()
def test_patching_sweeps_carry_the_images_of_both_runs(family, point):
    """From a run on one picture into a run on another: every layer gives a number of its own, none of them nothing."""
    model = wrapped(family)
    clean, corrupted = (model.prepare("What colour is the mug?", images=tiny_image(seed=s)) for s in (1, 2))
    _, cache = model.run_with_cache(clean)
    base, effects = model(corrupted)[0, -1], []
    for layer in range(LAYERS):
        name = cache.name_of((point, layer))
        patch = [(name, lambda x, hook: cache[hook.name])]
        effects.append((model.run_with_hooks(corrupted, fwd_hooks=patch)[0, -1] - base).norm().item())
    assert min(effects) > 1e-3 and len({round(e, 4) for e in effects}) == LAYERS
    patch = [(f"blocks.{LAYERS - 1}.hook_resid_post", lambda x, hook: cache[hook.name])]
    close(model.run_with_hooks(corrupted, fwd_hooks=patch), model(clean), 1e-5)  # the whole stream is the whole run


# -- the model itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_hooks", [False, True], ids=["no hooks", "hooks"])
def test_the_wrapped_model_is_saved_as_if_it_were_not_wrapped(family, with_hooks, tmp_path):
    hf, reference = fresh(family), plain(family)
    model = HookedMLLM.from_model(hf, tiny_processor(family))
    model.run_with_cache(model_inputs(family))
    if with_hooks:
        model.add_hook("*", lambda x, hook: x * 1)
    assert list(hf.state_dict()) == list(reference.state_dict())
    assert hf.config.to_dict() == tiny_config(family, layers=LAYERS, vision_layers=VISION_LAYERS).to_dict()
    hf.save_pretrained(tmp_path / "wrapped")
    reference.save_pretrained(tmp_path / "plain")
    saved = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("wrapped", "plain")]
    assert saved[0] == saved[1] and "hooked" not in json.dumps(saved[0])
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "wrapped").eval()
    with torch.no_grad():
        assert torch.equal(again(**model_inputs(family)).logits, reference(**model_inputs(family)).logits)


def test_a_tokenizer_and_a_config_made_in_memory_are_enough(family):
    hf = fresh(family)
    hf.config.architectures = None
    assert HookedMLLM.from_model(hf, tiny_processor(family)).cfg.n_layers == LAYERS


# -- hook names --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_hook_has_the_name_that_it_was_registered_under(family):
    model, seen = wrapped(family), []
    names = [
        "vision.blocks.0.attn.hook_z",
        *(f"blocks.0.{s}" for s in ("attn.hook_z", "mlp.hook_post", "hook_resid_post")),
    ]
    hooks = [(n, lambda x, hook: seen.append(hook.name)) for n in names]
    model.run_with_hooks(model_inputs(family), fwd_hooks=hooks)
    assert seen == names


@torch.no_grad()
def test_a_filter_on_suffixes_has_the_tower_and_layer_of_each_match(family):
    model, seen = wrapped(family), []
    hooks = [(lambda n: n.endswith("hook_resid_post"), lambda x, hook: seen.append((hook.tower, hook.layer())))]
    model.run_with_hooks(model_inputs(family), fwd_hooks=hooks)
    assert seen == [("vision", l) for l in range(VISION_LAYERS)] + [("text", l) for l in range(LAYERS)]

"""Patches against plain torch hooks on the modules of an unwrapped model, and against attention written out."""

import pytest
import torch

from helpers.eager_reference import Reference
from helpers.intervention_witness import GREEDY, batch, close, listen, real, sample, z_replaced
from helpers.tiny import FAMILIES
from helpers.wrapped import plain, wrapped
from hooked_mllm import ActivationPatch, HeadPatch
from hooked_mllm.errors import HeadError, HookNameError, HookValueError, LayoutError

BLOCK = "model.language_model.layers.1"
MODULES = {  # site: module of an unwrapped model, side
    "resid_pre": (BLOCK, "in"),
    "resid_post": (BLOCK, "out"),
    "attn_out": (f"{BLOCK}.self_attn", "out"),
    "mlp_out": (f"{BLOCK}.mlp", "out"),
    "post": (f"{BLOCK}.mlp.down_proj", "in"),
    "v": (f"{BLOCK}.self_attn.v_proj", "out"),
    "z": (f"{BLOCK}.self_attn.o_proj", "in"),
}
VISION = {
    "qwen3_vl": "model.visual.blocks.1",
    "llava_onevision": "model.vision_tower.encoder.layers.1",
    "internvl": "model.vision_tower.encoder.layer.1",
}


@pytest.fixture(scope="module")
def references():
    return {family: Reference(family) for family in FAMILIES}


@torch.no_grad()
def clean_and_other(family):
    """A cache of one picture, and the same question about another."""
    clean = sample(family, 6, 0)
    return wrapped(family).run_with_cache(clean)[1], sample(family, 0, 0), clean


@torch.no_grad()
def recorded(family, inputs, path, side, change=None):
    """What a module of an unwrapped model sees, and the logits when `change` replaces it."""
    model, seen = plain(family), []

    def fn(x):
        seen.append(x.clone())
        return None if change is None else change(x)

    handle = listen(model.get_submodule(path), side, fn)
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("site", ["z", "v"])
def test_heads_with_their_layer_are_those_of_numbers_in_that_layer(site):
    cache, inputs, _ = clean_and_other("qwen3_vl")
    model = wrapped("qwen3_vl")
    with model.intervene(ActivationPatch(site, cache, layers=1, heads=[1])):
        expected = model(inputs)
    for heads in ("L1H1", [(1, 1)], {1: 1}):
        with model.intervene(ActivationPatch(site, cache, heads=heads)) as records:
            assert torch.equal(model(inputs), expected)
        assert (records[0]["layers"], records[0]["heads"]) == ([1], ["L1H1"])
    with model.intervene(ActivationPatch(f"blocks.1.attn.hook_{site}", cache, heads="L1H1")):
        assert torch.equal(model(inputs), expected)
    with pytest.raises(HookValueError, match="L1H1 have a layer: leave layers out"):
        ActivationPatch(site, cache, layers=1, heads="L1H1")
    for hook, heads in ((f"blocks.0.attn.hook_{site}", "L1H1"), (site, "L1H99"), (site, "L9H1")):
        with pytest.raises((HeadError, HookNameError)), model.intervene(ActivationPatch(hook, cache, heads=heads)):
            model(inputs)


@pytest.mark.parametrize("site", MODULES)
@torch.no_grad()
def test_a_patch_at_named_positions_equals_a_torch_hook_that_does_it(family, site):
    cache, inputs, clean = clean_and_other(family)
    path, side = MODULES[site]
    new, _ = recorded(family, clean.inputs, path, side)
    rows = inputs.mask("target")
    _, expected = recorded(family, inputs.inputs, path, side, lambda x: torch.where(rows[..., None], new, x))
    with wrapped(family).intervene(ActivationPatch(site, cache, layers=1, positions="target")) as records:
        got = wrapped(family)(inputs)
    close(got, expected)
    assert (got - wrapped(family)(inputs)).abs().max() > 1e-3
    assert records[0]["applied"] == {"prefill": 1, "decode": 0}


@pytest.mark.parametrize("site", ["rot_q", "rot_k", "pattern", "attn_scores", "v", "z"])
@torch.no_grad()
def test_a_patch_of_some_heads_equals_attention_written_out(family, site, references):
    cache, inputs, clean = clean_and_other(family)
    reference, rows = references[family], inputs.mask("visual")
    reference(clean.inputs, {})
    new = reference.seen[reference.module("text", 1), site]
    square = site in ("pattern", "attn_scores")

    def change(x):
        out = x.clone()
        if square:
            out[:, 1] = torch.where(rows[..., None], new[:, 1], x[:, 1])
        else:
            out[:, :, 1] = torch.where(rows[..., None], new[:, :, 1], x[:, :, 1])
        return out

    with wrapped(family).intervene(ActivationPatch(site, cache, layers=[1], heads=1, positions="visual")):
        got = wrapped(family)(inputs)
    close(got, reference(inputs.inputs, {("text", 1, site): change}))
    assert (got - wrapped(family)(inputs)).abs().max() > 1e-3


@torch.no_grad()
def test_q_and_k_are_patched_before_rotation(family):
    cache, inputs, _ = clean_and_other(family)
    for site in ("q", "k"):
        with wrapped(family).intervene(ActivationPatch(site, cache, layers=1)):
            _, patched = wrapped(family).run_with_cache(inputs)
        close(patched[site, 1], cache[site, 1])
        close(patched[f"rot_{site}", 1], cache[f"rot_{site}", 1])


@torch.no_grad()
def test_the_last_residual_of_another_run_makes_its_logits(family):
    cache, inputs, _ = clean_and_other(family)
    with wrapped(family).intervene(ActivationPatch("resid_post", cache, layers=-1)):
        assert torch.equal(wrapped(family)(inputs), cache["logits"])
    with wrapped(family).intervene(ActivationPatch("embed", cache), ActivationPatch("z", cache)) as records:
        wrapped(family)(inputs)
    assert [r["applied"]["prefill"] for r in records] == [1, 3]


@torch.no_grad()
def test_deepstack_equals_the_features_replaced_in_the_language_models_arguments():
    cache, inputs, clean = clean_and_other("qwen3_vl")
    model, seen = plain("qwen3_vl"), []

    def keep(_, args, kwargs):
        seen.append([f.clone() for f in kwargs["deepstack_visual_embeds"]])

    def replace(_, args, kwargs):
        return args, {**kwargs, "deepstack_visual_embeds": [kwargs["deepstack_visual_embeds"][0], seen[0][1]]}

    for hook, given in ((keep, clean), (replace, inputs)):
        handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
        expected = model(**given.inputs).logits
        handle.remove()
    with wrapped("qwen3_vl").intervene(ActivationPatch("deepstack", cache, layers=1)):
        assert torch.equal(wrapped("qwen3_vl")(inputs), expected)
    with pytest.raises(HookNameError), wrapped("qwen3_vl").intervene(ActivationPatch("deepstack", cache, layers=2)):
        pass


@torch.no_grad()
def test_the_vision_tower(family, references):
    cache, inputs, clean = clean_and_other(family)
    model, reference = wrapped(family), references[family]
    new, _ = recorded(family, clean.inputs, VISION[family], "out")
    _, expected = recorded(family, inputs.inputs, VISION[family], "out", lambda x: new)
    with model.intervene(ActivationPatch("resid_post", cache, layers=1, tower="vision")):
        close(model(inputs), expected)
    reference(clean.inputs, {})
    z = reference.seen[reference.module("vision", 0), "z"]

    def change(x):
        out = x.clone()
        out[:, :4, 1] = z[:, :4, 1]
        return out

    expected = reference(inputs.inputs, {("vision", 0, "z"): change})
    with model.intervene(HeadPatch([(0, 1)], cache, positions=slice(0, 4), tower="vision")):
        close(model(inputs), expected)
    for name in ("vision.hook_out", "projector.hook_out"):
        with model.intervene(ActivationPatch(name, cache)) as records:
            _, patched = model.run_with_cache(inputs)
        assert torch.equal(patched[name], cache[name]) and records[0]["applied"]["prefill"] == 1


@torch.no_grad()
def test_heads_of_several_layers_in_a_padded_batch(family):
    clean, inputs, model = batch(family, seed=5), batch(family), wrapped(family)
    _, cache = model.run_with_cache(clean, "*hook_z")
    chosen, rows = [(0, 3), (2, 1), (2, 2)], inputs.mask("question")

    def change(z, layer):
        for l, h in chosen:
            if l == layer:
                z[:, :, h] = torch.where(rows[..., None], cache["z", l][:, :, h], z[:, :, h])
        return z

    with z_replaced(family, change) as witness:
        expected = witness(**inputs.inputs).logits
        tokens = witness.generate(**inputs.inputs, **{**GREEDY, "max_new_tokens": 1})
    with model.intervene(HeadPatch(chosen, cache, positions="question")):
        there = real(inputs.inputs)
        close(model(inputs)[there], expected[there])
        assert torch.equal(model.generate(inputs, **{**GREEDY, "max_new_tokens": 1}), tokens)


@torch.no_grad()
def test_a_patched_prompt_stays_patched_while_generating(family):
    cache, inputs, _ = clean_and_other(family)
    model = wrapped(family)
    for site in ("v", "rot_k", "pattern"):
        with model.intervene(ActivationPatch(site, cache, layers=1, positions="visual")):
            got = model.generate(inputs, **GREEDY)
            assert torch.equal(got, model.generate(inputs, **GREEDY, use_cache=False)), site


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"site": "zz"}, HookNameError, "holds no 'zz'"),
        ({"site": "blocks.9.attn.hook_z"}, HookNameError, "no hook point"),
        ({"layers": [3]}, HookNameError, "has 3 blocks"),
        ({"layers": []}, HookNameError, "empty"),
        ({"heads": []}, HeadError, "empty"),
        ({"heads": [4]}, HeadError, "heads 0 to 3"),
        ({"site": "v", "heads": [2]}, HeadError, "key-value heads 0 to 1"),
        ({"site": "resid_post", "heads": [0]}, HookValueError, "has no heads"),
        ({"site": "embed", "layers": [0]}, HookValueError, "belongs to no layer"),
        ({"site": "blocks.1.attn.hook_z", "layers": [1]}, HookValueError, "leave layers out"),
        ({"source": 3}, HookValueError, "got int"),
        ({"source_positions": "last"}, HookValueError, "give both"),
        ({"positions": "visual", "tower": "vision"}, LayoutError, "have no names"),
        ({"tower": "projector"}, HookValueError, "tower must be"),
    ],
)
def test_bad_input(arguments, error, message):
    cache, _, _ = clean_and_other("internvl")
    with pytest.raises(error, match=message):
        ActivationPatch(**{"site": "z", "source": cache, **arguments}).validate(wrapped("internvl"))


def test_a_cache_without_the_layer_is_rejected_when_it_is_set():
    model, s = wrapped("internvl"), sample("internvl")
    _, cache = model.run_with_cache(s, "blocks.0.attn.hook_z")
    with pytest.raises(HookNameError, match="does not hold"):
        HeadPatch([(0, 0), (1, 0)], cache).validate(model)
    with pytest.raises(HeadError, match="empty"):
        HeadPatch([], cache)

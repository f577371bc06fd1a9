"""The stand-in for a model's attention, against attention written out in an unwrapped model."""

import pytest
import torch
from transformers import DynamicCache

from helpers.eager_reference import Reference
from helpers.tiny import ALL_FAMILIES
from helpers.wrapped import LAYERS, edit, in_place, model_inputs, noise, plain, returned, wrapped
from hooked_mllm.attention.streaming import StreamingHeads

POINTS = ["rot_q", "rot_k", "v", "attn_scores", "pattern", "z"]
PREFIX = {"text": "", "vision": "vision."}


@pytest.fixture(scope="module")
def references():
    return {family: Reference(family) for family in ALL_FAMILIES}


def head_one(change):
    """The change on head 1 of q, k, v or z alone."""

    def fn(x):
        out = x.clone()
        out[:, :, 1] = change(x)[:, :, 1]
        return out

    return fn


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL_FAMILIES)
@pytest.mark.parametrize("tower", ["text", "vision"])
@torch.no_grad()
def test_the_points_see_what_the_models_own_attention_sees(name, tower, references):
    inputs, reference = model_inputs(name), references[name]
    close(reference(inputs, {}), plain(name, "eager")(**inputs).logits)  # the witness is the model
    seen = {}
    hooks = [
        (f"{PREFIX[tower]}blocks.1.attn.hook_{p}", lambda x, hook, p=p: seen.__setitem__(p, x.clone())) for p in POINTS
    ]
    wrapped(name).run_with_hooks(inputs, fwd_hooks=hooks)
    module = reference.module(tower, 1)
    for p in POINTS:
        expected = reference.seen[module, p]
        if p == "attn_scores":  # hidden keys: the lowest number, and near it
            visible = expected > -1e30
            assert (seen[p][~visible] < -1e30).all()
            close(seen[p][visible], expected[visible])
        else:
            close(seen[p], expected)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("tower", ["text", "vision"])
@pytest.mark.parametrize("name", ALL_FAMILIES)
@torch.no_grad()
def test_every_edit_reaches_the_logits_as_in_the_reference(name, tower, point, references):
    inputs, full = model_inputs(name), f"{PREFIX[tower]}blocks.1.attn.hook_{point}"
    change = edit(full)
    expected = references[name](inputs, {(tower, 1, point): change})
    model = wrapped(name)
    got = model.run_with_hooks(inputs, fwd_hooks=[(full, lambda x, hook: change(x))])
    close(got, expected)
    assert (got - model(inputs)).abs().max() > 0.01
    close(model.run_with_hooks(inputs, fwd_hooks=[(full, in_place(full))]), expected)


@torch.no_grad()
def test_edits_of_one_head_in_several_layers_and_both_towers_together(family, references):
    inputs = model_inputs(family, 2)
    double = head_one(lambda x: 2 * x)
    places = [("vision", 0, "rot_q"), ("vision", 1, "z"), ("text", 0, "v"), ("text", 2, "rot_k"), ("text", 2, "z")]
    hooks = [(f"{PREFIX[t]}blocks.{l}.attn.hook_{p}", lambda x, hook: double(x)) for t, l, p in places]
    expected = references[family](inputs, dict.fromkeys(places, double))
    close(wrapped(family).run_with_hooks(inputs, fwd_hooks=hooks), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("point", ["attn_scores", "pattern"])
@torch.no_grad()
def test_edits_in_a_padded_batch_reach_every_real_token(family, side, point, references):
    inputs = model_inputs(family, 1, 2, False, side)
    real = inputs["attention_mask"].bool()
    full = f"blocks.0.attn.hook_{point}"

    def change(x):
        by_head = torch.tensor([0.0, 1, 1, 2])[:, None, None]
        return x + 0.3 * noise(x[:, :, :1]) if point == "attn_scores" else x * by_head

    got = wrapped(family).run_with_hooks(inputs, fwd_hooks=[(full, lambda x, hook: change(x))])
    expected = references[family](inputs, {("text", 0, point): change})
    close(got[real], expected[real])
    # a row without a visible key has no pattern of its own: it is what the model's attention makes of it
    assert torch.isfinite(got).all()


@torch.no_grad()
def test_attention_to_images_knocked_out_equals_a_mask_without_them():
    for family in ("llava_onevision", "internvl"):  # Qwen3-VL derives positions from its mask
        inputs, model = model_inputs(family), wrapped(family)
        n = inputs["input_ids"].shape[1]
        visual = inputs["input_ids"][0] == model.hf_model.config.image_token_id
        cut = ~visual[:, None] & visual[None, :]
        mask = torch.ones(n, n).tril().bool() & ~cut
        expected = plain(family)(**{**inputs, "attention_mask": mask[None, None]}).logits
        knockout = ("blocks.*.attn.hook_attn_scores", lambda s, hook, c=cut: s.masked_fill(c, float("-inf")))
        got = model.run_with_hooks(inputs, fwd_hooks=[knockout])
        close(got, expected)


@torch.no_grad()
def test_scores_and_pattern_only_looked_at_keep_the_models_own_attention_bit_for_bit(family):
    inputs, model, rows = model_inputs(family), wrapped(family), []

    def look(x, hook):
        rows.append(x.sum(-1))

    got = model.run_with_hooks(inputs, fwd_hooks=[("*hook_pattern", look), ("*hook_attn_scores", lambda x, hook: x)])
    assert torch.equal(got, plain(family)(**inputs).logits)
    assert len(rows) == model.cfg.n_layers + model.cfg.vision_n_layers
    for row in rows:
        close(row, torch.ones_like(row))


# -- the key-value cache -----------------------------------------------------------------------------------------------


def two_steps(model, inputs, hooks, n_new=1):
    """Logits of the last token read after a cache of the others, and the keys and values cached by the first step."""
    ids = inputs["input_ids"]
    past = DynamicCache()
    with model.hooks(hooks):
        model({**inputs, "past_key_values": past}, use_cache=True)
    kept = [(layer.keys.clone(), layer.values.clone()) for layer in past.layers]
    mask = torch.ones(1, ids.shape[1] + n_new, dtype=torch.long)
    step = {"input_ids": ids[:, -n_new:], "attention_mask": mask, "past_key_values": past}
    if "mm_token_type_ids" in inputs:
        step["position_ids"] = torch.full((3, 1, n_new), ids.shape[1])
    return model(step, use_cache=True), kept


@pytest.mark.parametrize("layer", range(LAYERS))
@torch.no_grad()
def test_a_rotated_key_edited_in_place_leaves_the_cache_alone(family, layer):
    inputs, model, name = model_inputs(family), wrapped(family), f"blocks.{layer}.attn.hook_rot_k"
    expected, kept = two_steps(model, inputs, [])
    for hook in (in_place(name), returned(name)):
        logits, edited = two_steps(model, inputs, [(name, hook)])
        for (k, v), (k2, v2) in list(zip(kept, edited, strict=True))[: layer + 1]:
            assert torch.equal(k, k2) and torch.equal(v, v2)
    if layer == LAYERS - 1:  # nothing behind it is cached
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("point", ["k", "v"])
@torch.no_grad()
def test_edits_of_k_and_v_are_what_is_cached_in_place_or_returned(family, point):
    inputs, model, name = model_inputs(family), wrapped(family), f"blocks.1.attn.hook_{point}"
    base, kept = two_steps(model, inputs, [])
    a, cached_a = two_steps(model, inputs, [(name, in_place(name))])
    b, cached_b = two_steps(model, inputs, [(name, returned(name))])
    assert torch.equal(a, b) and (a - base).abs().max() > 1e-3
    which = 0 if point == "k" else 1
    assert torch.equal(cached_a[1][which], cached_b[1][which])
    assert not torch.equal(cached_a[1][which], kept[1][which])
    assert torch.equal(cached_a[1][1 - which], kept[1][1 - which])  # the other of the two is as it was
    assert all(torch.equal(x, y) for x, y in zip(cached_a[0], kept[0], strict=True))


class Windowed:
    """A user's backend with `restrict`: a window in the layers named, the model's own attention elsewhere."""

    def __init__(self, layers, window):
        self.layers, self.window, self.calls = layers, window, []

    def restrict(self, q, k, mask, scale, layer):
        return mask.streamed(StreamingHeads((), q.shape[1], 0, self.window)) if layer in self.layers else mask

    def __call__(self, q, k, v, mask, scale, layer):
        self.calls.append(layer)
        seen = mask.head_rows(torch.arange(mask.q_length).expand(mask.batch, -1))
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, torch.finfo(q.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2)


@torch.no_grad()
def test_a_users_backend_that_restricts_is_called_where_it_does(family):
    inputs, model = model_inputs(family, 2, 2), wrapped(family)
    _, own = model.run_with_cache(inputs, names_filter="*hook_pattern")
    backend = Windowed((1,), 3)
    with model.attention(backend):
        got, cache = model.run_with_cache(inputs, names_filter=["*hook_pattern", "*hook_v", "*hook_z"])
        assert torch.equal(model(inputs), got)
        assert model.info.attention == "Windowed over sdpa" and model.info.attention_settings is None
    assert backend.calls == [1, 1]
    assert torch.equal(cache["pattern", 0], own["pattern", 0])
    pattern, real = cache["pattern", 1], inputs["attention_mask"].bool()
    n = pattern.shape[-1]
    assert (pattern.transpose(1, 2)[real].sum(-1) - 1).abs().max() < 1e-5
    far = torch.arange(n) <= torch.arange(n)[:, None] - 3
    assert (pattern.masked_fill(~far, 0).transpose(1, 2)[real] == 0).all()
    v = cache["v", 1].repeat_interleave(2, dim=2)
    close(cache["z", 1][real], torch.einsum("bhqk,bkhd->bqhd", pattern, v)[real])


@pytest.mark.parametrize("point", ["attn_scores", "pattern"])
def test_attention_weights_that_transformers_returns_are_the_edited_ones(family, point):
    """One for each layer: a list without the edited layer would be misaligned."""
    model, inputs = wrapped(family, "eager"), model_inputs(family)
    expected = plain(family, "eager")(**inputs, output_attentions=True).attentions
    with model.hooks([(f"blocks.1.attn.hook_{point}", lambda x, hook: x * 0.5)]):
        weights = model(inputs, return_type="output", output_attentions=True).attentions
        _, cache = model.run_with_cache(inputs, "blocks.1.attn.hook_pattern")
    assert len(weights) == len(expected) and torch.equal(weights[0], expected[0])
    assert not torch.equal(weights[1], expected[1])
    torch.testing.assert_close(weights[1], cache["pattern", 1])

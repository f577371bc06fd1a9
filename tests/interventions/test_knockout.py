"""Attention knockout against eager attention with an edited mask, under every implementation and kind of mask."""

import pytest
import torch

from helpers.eager_reference import Reference
from helpers.intervention_witness import GREEDY, batch, close, real, sample
from helpers.tiny import FAMILIES
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm import AttentionKnockout, HeadAblation
from hooked_mllm.errors import HeadError, HookNameError, HookValueError
from hooked_mllm.interventions import knockout_windows


@pytest.fixture(scope="module")
def references():
    return {family: Reference(family) for family in FAMILIES}


def hidden(queries, keys, heads=range(4)):
    """An edit of scores that hides `keys` from `queries` (masks `[batch pos]`) in some heads."""
    flags = torch.zeros(4, dtype=torch.bool)
    flags[list(heads)] = True
    cut = flags[:, None, None] & queries[:, None, :, None] & keys[:, None, None, :]
    return lambda scores: scores.masked_fill(cut, torch.finfo(scores.dtype).min)


def plain_attention(q, k, v, mask, scale, layer):
    """A user's own backend."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
    visible = mask.full()[:, None]
    weights = torch.softmax(scores.masked_fill(~visible, -1e9), -1)
    return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_it_equals_an_edited_mask_under_every_backend(family, side, references):
    inputs = batch(family, side)
    there, edit = real(inputs.inputs), hidden(inputs.mask("question"), inputs.mask("target"))
    expected = references[family](inputs.inputs, {("text", l, "attn_scores"): edit for l in (0, 2)})
    knockout = AttentionKnockout(layers=[0, -1], queries="question", keys="target", phase="prefill")
    for implementation in ("sdpa", "eager", plain_attention):
        model = wrapped(family)
        with model.attention(implementation), model.intervene(knockout):
            got = model(inputs)
        close(got[there], expected[there])
    assert (got - model(inputs))[inputs.mask("last")].abs().max() > 0.01


@pytest.mark.parametrize("additive", [True, False])
@torch.no_grad()
def test_it_equals_transformers_under_an_edited_4d_mask(additive):
    for family in ("llava_onevision", "internvl"):  # Qwen3-VL derives positions from its mask
        inputs, model = batch(family), wrapped(family)
        there, n = real(inputs.inputs), inputs.inputs["input_ids"].shape[1]
        causal = torch.ones(n, n).tril().bool() & there[:, None, :]
        cut = causal & ~(inputs.mask("last")[:, :, None] & inputs.mask("visual")[:, None, :])

        def given(visible):
            if not additive:
                return visible[:, None]
            return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]

        known = {"position_ids": (there.long().cumsum(1) - 1).clamp(min=0)}
        expected = plain(family)(**{**inputs.inputs, "attention_mask": given(cut), **known}).logits
        knockout = AttentionKnockout(
            layers=range(LAYERS), queries=inputs.mask("last"), keys=inputs.mask("visual"), phase="prefill"
        )
        with model.intervene(knockout):
            close(model({**inputs.inputs, **known})[there], expected[there])
            close(model({**inputs.inputs, "attention_mask": given(causal), **known})[there], expected[there])


@torch.no_grad()
def test_single_heads_and_the_rest_of_their_layer(family, references):
    inputs, model = sample(family), wrapped(family)
    every = torch.ones(1, len(inputs), dtype=torch.bool)
    edit = hidden(inputs.mask("last"), inputs.mask("visual"), heads=[1, 2])
    expected = references[family](inputs.inputs, {("text", 1, "attn_scores"): edit})
    with model.intervene(AttentionKnockout(["L1H1", (1, 2)], "last", "visual", phase="prefill")):
        _, cache = model.run_with_cache(inputs)
        close(cache["logits"], expected)
    # all queries behind the picture: those before it never saw it
    first = int(inputs.mask("visual")[0].nonzero()[0])
    later = every & (torch.arange(len(inputs)) > first)
    with model.intervene(AttentionKnockout([(1, 1)], slice(first + 1, None), [first], phase="prefill")):
        got = model(inputs)
    only = torch.zeros_like(every)
    only[0, first] = True
    close(got, references[family](inputs.inputs, {("text", 1, "attn_scores"): hidden(later, only, [1])}))


@torch.no_grad()
def test_the_vision_tower(family, references):
    inputs, model = sample(family), wrapped(family)

    def edit(scores):
        out = scores.clone()
        out[:, 1, 2:5, :3] = torch.finfo(scores.dtype).min
        return out

    expected = references[family](inputs.inputs, {("vision", 1, "attn_scores"): edit})
    knockout = AttentionKnockout([(1, 1)], [2, 3, 4], slice(0, 3), phase="prefill", tower="vision")
    with model.intervene(knockout):
        got = model(inputs)
    close(got, expected)
    assert (got - model(inputs)).abs().max() > 0.01


@pytest.mark.parametrize("phase", ["decode", "both"])
@torch.no_grad()
def test_generated_tokens_do_not_see_the_keys(family, phase, references):
    inputs, model = sample(family), wrapped(family)
    n = len(inputs)
    logits = []

    def keep(ids, scores):
        logits.append(scores.clone())
        return scores

    queries = {} if phase == "decode" else {"queries": "last"}
    with model.intervene(AttentionKnockout(layers=[0, 2], keys="visual", phase=phase, **queries)):
        tokens = model.generate(inputs, **GREEDY, logits_processor=[keep])
        assert torch.equal(tokens, model.generate(inputs, **GREEDY, use_cache=False))
    new = tokens.shape[1] - n
    whole = {k: v for k, v in inputs.inputs.items() if v.shape != (1, n)}
    for name, value in inputs.inputs.items():
        if value.shape == (1, n):
            more = torch.full((1, new), int(name == "attention_mask"), dtype=value.dtype)
            whole[name] = torch.cat([value, tokens[:, n:] if name == "input_ids" else more], 1)
    rows = torch.arange(n + new)[None] >= (n if phase == "decode" else n - 1)
    keys = torch.nn.functional.pad(inputs.mask("visual"), (0, new))
    edits = {("text", l, "attn_scores"): hidden(rows, keys) for l in (0, 2)}
    expected = references[family](whole, edits)[0, n - 1 : -1]
    close(torch.cat(logits), expected)
    assert (expected - references[family](whole, {})[0, n - 1 : -1]).abs().max() > 0.01


@torch.no_grad()
def test_a_static_cache_is_masked_as_a_growing_one():
    inputs, model = batch("llava_onevision"), wrapped("llava_onevision")
    with model.intervene(AttentionKnockout(layers=[0, 1, 2], queries="last", keys="visual", phase="both")):
        expected = model.generate(inputs, **GREEDY)
        assert torch.equal(model.generate(inputs, **GREEDY, cache_implementation="static"), expected)
    assert not torch.equal(model.generate(inputs, **GREEDY), expected)


@torch.no_grad()
def test_an_even_row_is_even_over_the_keys_that_are_left(family):
    inputs, model = sample(family), wrapped(family)
    knockout = AttentionKnockout([(1, 0)], "last", "visual", phase="prefill")
    even, seen = HeadAblation([(1, 0)], mode="uniform", phase="prefill"), []
    with model.intervene(knockout, even), model.hooks([("blocks.1.attn.hook_pattern", lambda p, hook: seen.append(p))]):
        model(inputs)
    row, visual = seen[0][0, 0, -1], inputs.mask("visual")[0]
    assert (row[visual] == 0).all()
    close(row[~visual], torch.full_like(row[~visual], 1 / int((~visual).sum())))


@torch.no_grad()
def test_a_row_that_would_be_empty_is_rejected(family):
    inputs, model = batch(family), wrapped(family)
    everything = AttentionKnockout([(1, 2)], "last", slice(None), phase="prefill")
    with (
        pytest.raises(HookValueError, match=r"blocks\.1\..*query \d+ of sample 0 .* head 2"),
        model.intervene(everything),
    ):
        model(inputs)
    assert not model.list_hooks()
    close(model(inputs), plain(family)(**inputs.inputs).logits)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": [(0, 0)], "layers": [0]}, HookValueError, "not both"),
        ({}, HookValueError, "Give the heads= or the layers="),
        ({"layers": [0], "keys": None}, HookValueError, "keys="),
        ({"heads": []}, HeadError, "empty"),
        ({"layers": []}, HookNameError, "empty"),
        ({"layers": [3]}, HookNameError, "has 3 blocks"),
        ({"heads": [(0, 4)]}, HeadError, "heads are 0 to 3"),
        ({"layers": [0], "queries": "question", "phase": "decode"}, HookValueError, "generated tokens"),
    ],
)
def test_bad_input(arguments, error, message):
    model = wrapped("qwen3_vl")
    with pytest.raises(error, match=message):
        AttentionKnockout(**{"keys": "visual", "phase": "prefill", **arguments}).validate(model)


def test_windows_are_those_of_geva_et_al():
    model = wrapped("qwen3_vl")
    assert [list(w) for w in knockout_windows(model, 1)] == [[0], [1], [2]]
    assert [list(w) for w in knockout_windows(model, 2)] == [[0], [0, 1], [1, 2]]
    assert [list(w) for w in knockout_windows(model, 3)] == [[0, 1], [0, 1, 2], [1, 2]]
    assert len(knockout_windows(model, 2, tower="vision")) == 2
    for k in (0, 4):
        with pytest.raises(HookValueError, match="1 to 3"):
            knockout_windows(model, k)

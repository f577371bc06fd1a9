"""Head ablation against the input of W_O replaced in an unwrapped model, and against attention written out."""

import pytest
import torch

from helpers.ablation_witness import CHOSEN, ablate, by_hand
from helpers.eager_reference import Reference
from helpers.intervention_witness import batch, close, o_proj, real, sample, z_replaced
from helpers.tiny import FAMILIES, HEAD_DIM
from helpers.wrapped import LAYERS, VISION_LAYERS, fresh, wrapped
from hooked_mllm import HeadAblation, HeadSet
from hooked_mllm.errors import HeadError, HookValueError, LayoutError


@pytest.fixture(scope="module")
def references():
    return {family: Reference(family) for family in FAMILIES}


@torch.no_grad()
def test_zero_equals_a_model_whose_output_projection_has_no_such_columns(family):
    inputs, model = batch(family), fresh(family)
    for layer, head in CHOSEN:
        o_proj(model, layer).weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
    with wrapped(family).intervene(HeadAblation(CHOSEN, mode="zero", phase="prefill")):
        got = wrapped(family)(inputs)
    there = real(inputs.inputs)
    close(got[there], model(**inputs.inputs).logits[there])
    assert (got - wrapped(family)(inputs))[there].abs().max() > 0.01


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_scale_at_named_positions_of_a_padded_batch_touches_those_alone(family, side):
    inputs = batch(family, side)
    question = inputs.mask("question")

    def change(z, layer):
        out = by_hand(lambda z, l, h: -2 * z[:, :, h])(z, layer)
        return torch.where(question[..., None, None], out, z)

    ablation = HeadAblation("L0H1, L2H0, L2H3", mode="scale", factor=-2, phase="prefill", positions="question")
    with wrapped(family).intervene(ablation):
        got = wrapped(family)(inputs)
    with z_replaced(family, change) as model:
        assert torch.equal(got, model(**inputs.inputs).logits)


@torch.no_grad()
def test_mean_is_that_of_the_tokens_of_the_reference_samples(family):
    model, samples, kept = wrapped(family), [batch(family, seed=3), sample(family, 2)], {}
    rows = [real(s.inputs) for s in samples]
    for s, there in zip(samples, rows, strict=True):
        with z_replaced(family, lambda z, l, t=there: kept.setdefault(l, []).append(z[t])) as witness:
            witness(**s.inputs)
    means = {l: torch.cat(parts).double().mean(0).float() for l, parts in kept.items()}
    reference = HeadAblation.reference(model, samples, CHOSEN)
    assert (reference.n_samples, reference.n_tokens) == (3, sum(int(t.sum()) for t in rows))
    for layer, head in CHOSEN:
        torch.testing.assert_close(reference.mean[layer, head], means[layer][head])
    assert reference.mean[1].isnan().all()

    inputs = sample(family, 1)
    with z_replaced(family, by_hand(lambda z, l, h: means[l][h])) as witness:
        expected = witness(**inputs.inputs).logits
    for given in (reference, torch.stack([means[l] for l in range(LAYERS)])):
        with model.intervene(HeadAblation(CHOSEN, mode="mean", phase="prefill", reference=given)):
            close(model(inputs), expected)
    assert not torch.allclose(expected, model(inputs), atol=0.01)


@torch.no_grad()
def test_resample_from_the_cache_of_another_sample(family):
    model, inputs, other = wrapped(family), sample(family, 0, 0), sample(family, 4, 0)
    _, cache = model.run_with_cache(other, "*hook_z")
    with model.intervene(HeadAblation(CHOSEN, mode="resample", phase="prefill", reference=cache)):
        got = model(inputs)
    with z_replaced(family, by_hand(lambda z, l, h: cache["z", l][:, :, h])) as witness:
        assert torch.equal(got, witness(**inputs.inputs).logits)
    with (
        pytest.raises(
            LayoutError, match=rf"{len(other)} \(\d+ visual\) tokens; this run has {len(sample(family, 1))} "
        ),
        model.intervene(HeadAblation(CHOSEN, mode="resample", phase="prefill", reference=cache)),
    ):
        model(sample(family, 1))


@torch.no_grad()
def test_resample_draws_tokens_by_seed_alike_for_all_heads(family):
    model, inputs, seen = wrapped(family), sample(family), {}
    reference = HeadAblation.reference(model, [sample(family, 1), sample(family, 3)], CHOSEN, keep_tokens=True)

    def run(seed):
        ablation = HeadAblation(CHOSEN, mode="resample", phase="prefill", reference=reference, seed=seed)
        with model.intervene(ablation), model.hooks([("*z", lambda z, hook: seen.__setitem__(hook.name, z.clone()))]):
            return model(inputs)

    first = run(1)
    z = seen["blocks.2.attn.hook_z"][0]
    which = [
        ((z[:, head][:, None] - reference.tokens[2][None, :, column]).abs().amax(-1) == 0).int().argmax(1)
        for column, head in enumerate((0, 3))
    ]
    for column, (head, tokens) in enumerate(zip((0, 3), which, strict=True)):
        assert torch.equal(z[:, head], reference.tokens[2][tokens][:, column])
    assert torch.equal(which[0], which[1]) and len(which[0].unique()) > 5
    assert torch.equal(first, run(1)) and not torch.equal(first, run(2))


def even(reference, tower, layer, heads, rows=None):
    """`edits` of `Reference`: z of these heads becomes the mean of v over the keys whose score is not hidden."""
    module = reference.module(tower, layer)

    def change(z):
        scores, v = reference.seen[module, "attn_scores"], reference.seen[module, "v"]
        visible = (scores > -1e30).float()
        groups = z.shape[2] // v.shape[2]
        out = z.clone()
        for head in heads:
            weights = visible[:, head] / visible[:, head].sum(-1, keepdim=True).clamp(min=1)  # padding sees nothing
            new = torch.einsum("bqk,bkd->bqd", weights, v[:, :, head // groups])
            out[:, :, head] = new if rows is None else torch.where(rows[..., None], new, z[:, :, head])
        return out

    return {(tower, layer, "z"): change}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_uniform_is_the_mean_value_of_the_visible_keys(family, implementation, references):
    inputs, reference, model = batch(family), references[family], wrapped(family, implementation)
    there, last = real(inputs.inputs), inputs.mask("last")
    for positions, rows in ((None, None), ("last", last)):
        expected = reference(inputs.inputs, even(reference, "text", 1, (0, 3), rows))
        with model.intervene(HeadAblation([(1, 0), (1, 3)], mode="uniform", phase="prefill", positions=positions)):
            got = model(inputs)
        close(got[there], expected[there])
    assert (got - model(inputs))[last].abs().max() > 0.01


@torch.no_grad()
def test_heads_of_the_vision_tower(family, references):
    inputs, reference, model = sample(family), references[family], wrapped(family)
    zeroed = {("vision", 1, "z"): lambda z: z * torch.tensor([1.0, 0])[:, None]}
    with model.intervene(HeadAblation([(1, 1)], mode="zero", phase="prefill", tower="vision")):
        close(model(inputs), reference(inputs.inputs, zeroed))
    with model.intervene(HeadAblation([(0, 1)], mode="uniform", phase="prefill", tower="vision")):
        close(model(inputs), reference(inputs.inputs, even(reference, "vision", 0, [1])))
    reference(inputs.inputs, {})
    mean = reference.seen[reference.module("vision", 1), "z"].flatten(0, 1).mean(0)
    means = HeadAblation.reference(model, inputs, [(1, 0), (1, 1)], tower="vision")
    close(means.mean[1], mean)
    replaced = {("vision", 1, "z"): lambda z: mean.expand_as(z).contiguous()}
    with model.intervene(HeadAblation([(1, 0), (1, 1)], mode="mean", phase="prefill", reference=means, tower="vision")):
        close(model(inputs), reference(inputs.inputs, replaced))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": []}, HeadError, "empty"),
        ({"heads": HeadSet(n_layers=3, n_heads=4)}, HeadError, "empty"),
        ({"mode": "none"}, HookValueError, "mode must be one of 'zero'"),
        ({"phase": "always"}, HookValueError, "phase must be one of"),
        ({"mode": "mean"}, HookValueError, "needs a reference"),
        ({"mode": "resample"}, HookValueError, "needs a reference"),
        ({"reference": torch.zeros(3, 4, 8)}, HookValueError, "takes no reference"),
        ({"mode": "mean", "reference": 3}, HookValueError, "got int"),
        ({"mode": "resample", "reference": torch.zeros(3)}, HookValueError, "got Tensor"),
        ({"mode": "scale"}, HookValueError, "`factor` goes with"),
        ({"factor": 2.0}, HookValueError, "`factor` goes with"),
        ({"mode": "scale", "factor": float("nan")}, HookValueError, "finite"),
        ({"seed": 2}, HookValueError, "`seed` goes with"),
        ({"phase": "decode", "positions": "question"}, HookValueError, "positions out"),
        ({"phase": "both", "tower": "vision"}, HookValueError, "prefill alone"),
        ({"positions": "visual", "tower": "vision"}, LayoutError, "have no names"),
        ({"tower": "audio"}, HookValueError, "tower must be one of"),
    ],
)
def test_arguments_that_are_missing_or_contradict_each_other(arguments, error, message):
    with pytest.raises(error, match=message):
        ablate(**arguments)


def test_mode_and_phase_must_be_specified():
    for kept in ("mode", "phase"):
        with pytest.raises(TypeError, match="mode" if kept == "phase" else "phase"):
            HeadAblation([(0, 1)], **{kept: "zero" if kept == "mode" else "both"})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": [(LAYERS, 0)]}, HeadError, "layers are 0 to 2"),
        ({"heads": ["L0H4"]}, HeadError, "heads are 0 to 3"),
        ({"heads": [(0, 2)], "tower": "vision"}, HeadError, "heads are 0 to 1"),
        ({"heads": [(VISION_LAYERS, 0)], "tower": "vision"}, HeadError, "layers are 0 to 1"),
        ({"heads": HeadSet([(9, 9)], n_layers=36, n_heads=32)}, HeadError, "36 x 32 .* has 3 x 4"),
        ({"mode": "mean", "reference": torch.zeros(3, 4, 7)}, HookValueError, r"\(3, 4, 8\); got \(3, 4, 7\)"),
    ],
)
def test_what_does_not_fit_the_model(arguments, error, message):
    model = wrapped("qwen3_vl")
    with pytest.raises(error, match=message), model.intervene(ablate(**arguments)):
        pass
    assert not model.list_hooks()

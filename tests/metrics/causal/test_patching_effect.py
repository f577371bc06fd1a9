"""PatchingEffect against bare torch hooks on the plain model, one patch at a time."""

import pytest
import torch

from helpers.intervention_witness import batch, listen, sample
from helpers.tiny import FAMILIES, HEAD_DIM, HEADS, KV_HEADS
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm import HookedMLLM, corruptions, toys
from hooked_mllm.errors import HookNameError, HookValueError, InputError, LayoutError, NumericsError
from hooked_mllm.metrics import PatchingEffect
from hooked_mllm.objectives import AnswerLogProb, KLDivergence, LogitDifference

DIFFERENCE = LogitDifference(5, wrong=9)


def pair(family):
    """The same question on two pictures."""
    return sample(family, 0, 0), sample(family, 1, 0)


def module(model, site, layer):
    block = model.model.language_model.layers[layer]
    return {
        "z": (block.self_attn.o_proj, "in"),
        "v": (block.self_attn.v_proj, "out"),
        "resid_pre": (block, "in"),
        "mlp_out": (block.mlp, "out"),
    }[site]


def score(logits):
    return (logits[:, -1, 5] - logits[:, -1, 9]).double().sum()


def run(family, inputs, *hooks):
    handles = [listen(*module(plain(family), site, layer), fn) for site, layer, fn in hooks]
    with torch.no_grad():
        logits = plain(family)(**inputs.inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def recorded(family, inputs, site, layer):
    kept = []
    run(family, inputs, (site, layer, lambda x: kept.append(x.clone())))
    return kept[0]


def patched(family, base, site, layer, source, index):
    """The base run with `source[index]` in place."""

    def put(x):
        x = x.clone()
        x[index] = source[index]
        return x

    return score(run(family, base, (site, layer, put)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(("site", "heads"), [("z", HEADS), ("v", KV_HEADS)])
def test_every_head(family, direction, site, heads):
    clean, corrupted = pair(family)
    base, other = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    a, b = score(run(family, clean)), score(run(family, corrupted))
    got = PatchingEffect(site, direction=direction).run(
        wrapped(family), (clean, corrupted), objective=DIFFERENCE, progress=False
    )
    for layer in range(LAYERS):
        source = recorded(family, other, site, layer)
        for head in range(heads):
            index = (..., slice(head * HEAD_DIM, (head + 1) * HEAD_DIM))
            change = patched(family, base, site, layer, source, index) - (b if direction == "denoising" else a)
            expected = float(change / (a - b)) * (1 if direction == "denoising" else -1)
            groups = HEADS // heads
            for query_head in range(head * groups, (head + 1) * groups):
                assert got[layer, query_head] == pytest.approx(expected, abs=2e-4 / abs(float(a - b)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out"])
def test_every_position(family, site):
    clean, corrupted = pair(family)
    table = PatchingEffect(site, layers=[0, 2], normalise=False).run(
        wrapped(family), (clean, corrupted), objective=DIFFERENCE, progress=False
    )
    assert table.shape == (2, len(clean)) and table.layers == (0, 2)
    bottom = score(run(family, corrupted))
    for layer in (0, 2):
        source = recorded(family, clean, site, layer)
        for place in range(0, len(clean), 7):
            expected = patched(family, corrupted, site, layer, source, (slice(None), place)) - bottom
            assert table[layer, place] == pytest.approx(float(expected), abs=1e-5)


def test_kinds_cover_everything_before_the_first_block():
    clean, corrupted = pair("qwen3_vl")
    table = PatchingEffect("resid_pre", by="kind", layers=0).run(
        wrapped("qwen3_vl"), [(clean, corrupted)], objective=DIFFERENCE, progress=False
    )
    assert {"target", "visual", "question", "template"} <= set(table.places)
    source, bottom = recorded("qwen3_vl", clean, "resid_pre", 0), score(run("qwen3_vl", corrupted))
    whole = score(run("qwen3_vl", clean)) - bottom
    rows = clean.layout.mask("visual") & ~clean.target_mask
    expected = (patched("qwen3_vl", corrupted, "resid_pre", 0, source, (slice(None), rows)) - bottom) / whole
    assert table[0, "visual"] == pytest.approx(float(expected), abs=1e-4)


def test_a_batch_gives_what_its_pairs_give():
    model = wrapped("internvl")
    clean, corrupted = batch("internvl"), batch("internvl", seed=1)
    whole = PatchingEffect("z").run(model, (clean, corrupted), objective=DIFFERENCE, progress=False)
    apart = PatchingEffect("z").run(
        model, list(zip(clean, corrupted, strict=True)), objective=DIFFERENCE, progress=False
    )
    assert torch.allclose(whole.values, apart.values, atol=1e-4)
    assert whole.provenance["n_samples"] == 2


def test_kl_is_to_the_clean_run_for_every_base():
    model, (clean, corrupted) = wrapped("qwen3_vl"), pair("qwen3_vl")
    table = PatchingEffect("resid_post", by="layer", layers=-1).run(
        model, (clean, corrupted), objective=KLDivergence(), progress=False
    )
    assert table.provenance["clean"] == pytest.approx(0, abs=1e-6) and table.provenance["corrupted"] > 1e-3
    assert table.values.item() == pytest.approx(1, abs=1e-3)  # the last residual stream is the whole clean run


def test_where_a_toy_reads_the_answer():
    model = HookedMLLM.from_pretrained("toy-internvl", dtype="float32")
    samples = toys.VisualRetrieval(pages=1).samples(model, 2, answer=True)
    pairs = [(s, corruptions.MeanRegion()(model, s)) for s in samples]
    table = PatchingEffect("resid_pre", by="kind").run(model, pairs, objective=AnswerLogProb(), progress=False)
    assert table[0, "target"] > 0.9 and table[5, "target"] < 0.1  # read before the last layer, by the last position
    heads = PatchingEffect("z").run(model, pairs, objective=AnswerLogProb(), progress=False)
    assert {layer for layer, _ in heads.top(3)} == {2}


def test_bad_input():
    model, (clean, corrupted) = wrapped("qwen3_vl"), pair("qwen3_vl")
    longer = sample("qwen3_vl", 0, 1)
    with pytest.raises(LayoutError, match="Clean.*Corrupted"):
        PatchingEffect("z").run(model, (clean, longer), objective=DIFFERENCE, progress=False)
    with pytest.raises(InputError, match="pairs"):
        PatchingEffect("z").run(model, [clean], objective=DIFFERENCE, progress=False)
    with pytest.raises(InputError, match="empty"):
        PatchingEffect("z").run(model, [], objective=DIFFERENCE, progress=False)
    with pytest.raises(NumericsError, match="same objective"):
        PatchingEffect("z").run(model, (clean, clean), objective=DIFFERENCE, progress=False)
    with pytest.raises(HookValueError, match="site"):
        PatchingEffect("logits")
    with pytest.raises(HookValueError, match="by"):
        PatchingEffect("z", by="position")
    with pytest.raises(HookValueError, match="positions"):
        PatchingEffect("resid_pre", by="kind", positions="question")
    with pytest.raises(InputError, match="one length"):
        PatchingEffect("resid_pre").run(
            model, [(clean, corrupted), (longer, longer)], objective=DIFFERENCE, progress=False
        )
    with pytest.raises(HookNameError, match="out of range"):
        PatchingEffect("z", layers=LAYERS).run(model, (clean, corrupted), objective=DIFFERENCE, progress=False)

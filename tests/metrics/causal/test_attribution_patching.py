"""Attribution patching against gradients taken on unwrapped models, and against real patching on the toys."""

import pytest
import torch
from torch import Tensor

from helpers.intervention_witness import batch, sample
from helpers.tiny import HEAD_DIM, HEADS, KV_HEADS
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm import HookedMLLM, corruptions
from hooked_mllm.errors import HookValueError, LayoutError, NumericsError
from hooked_mllm.metrics import AttributionPatching, PatchingEffect
from hooked_mllm.metrics.causal.gradients import Products
from hooked_mllm.objectives import FunctionObjective, GreedyAccuracy, KLDivergence, LogitDifference
from hooked_mllm.toys import VisualRetrieval

CORRECT, WRONG = 7, [11, 30, 200]
DIFFERENCE = LogitDifference(CORRECT, wrong=WRONG)
HEAD_SITES = {"z": HEADS, "q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
STREAM_SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")


def pair(family, kind="sample"):
    """Two samples, or batches padded on the left, that differ in their pictures."""
    if kind == "sample":
        return sample(family, 0, question=0), sample(family, 2, question=0)
    return batch(family, "left", 0), batch(family, "left", 3)


# -- the same on an unwrapped model: zeros added at every site, whose gradients are those of the activations ----------


def place(model, site, layer):
    """The module where a site is, and whether it is its input or its output."""
    block = model.model.language_model.layers[layer]
    attention = block.self_attn  # Qwen3 normalises q and k, head by head; Qwen2 does not
    return {
        "z": (block.self_attn.o_proj, "in"),
        "q": (getattr(attention, "q_norm", attention.q_proj), "out"),
        "k": (getattr(attention, "k_norm", attention.k_proj), "out"),
        "v": (block.self_attn.v_proj, "out"),
        "resid_pre": (block, "in"),
        "resid_post": (block, "out"),
        "attn_out": (block.self_attn, "out"),
        "mlp_out": (block.mlp, "out"),
    }[site]


def listen(module, side, fn):
    def pre(_, args, kwargs):
        got = fn(args[0] if args else kwargs["hidden_states"])
        return ((got, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": got})

    def post(_, args, output):
        got = fn(output[0] if isinstance(output, tuple) else output)
        return (got, *output[1:]) if isinstance(output, tuple) else got

    if side == "in":
        return module.register_forward_pre_hook(pre, with_kwargs=True, prepend=True)
    return module.register_forward_hook(post, prepend=True)


def plain_run(model, inputs, site, entering=None):
    """Activations of a site, the zeros added to them, what enters the language model, and the last logits."""
    seen, zeros, entered, handles = [], [], {}, []

    def add(x):
        zero = torch.zeros_like(x, requires_grad=True)
        seen.append(x.detach())
        zeros.append(zero)
        return x + zero

    def enter(_, args, kwargs):
        features = kwargs.get("deepstack_visual_embeds")
        entered.update(embeds=kwargs["inputs_embeds"].detach(), features=[f.detach() for f in features or []])
        if entering is None:
            return None
        new = {**kwargs, "inputs_embeds": entering["embeds"]}
        return args, {**new, "deepstack_visual_embeds": entering["features"]} if features else new

    try:
        handles.append(model.model.language_model.register_forward_pre_hook(enter, with_kwargs=True))
        for layer in range(LAYERS):
            handles.append(listen(*place(model, site, layer), add))
        logits = model(**inputs, use_cache=False).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return seen, zeros, entered, logits


def difference(logits, _):
    return logits[:, CORRECT] - logits[:, WRONG].mean(1)


def divergence(logits, clean):
    p = clean.detach().log_softmax(-1)
    return (p.exp() * (p - logits.log_softmax(-1))).sum(-1)


def plain_attribution(family, two, site, forth, measure=difference, points=None, positions=None, normalise=True):
    """[layer batch pos width] of products, summed over the batch, and divided by the difference of the runs."""
    model = plain(family)
    runs = [plain_run(model, item.inputs, site) for item in two]
    clean_logits = runs[0][3]
    whole = float((measure(runs[0][3], clean_logits) - measure(runs[1][3], clean_logits)).sum().detach())
    (source, base), inputs = (runs, two[1].inputs) if forth else (runs[::-1], two[0].inputs)
    change = [s - b for s, b in zip(source[0], base[0], strict=True)]
    total = [torch.zeros_like(c, dtype=torch.float64) for c in change]
    for n in range(points or 1):
        entering = None
        if points is not None:
            share = (n + 0.5) / points

            def mixed(a, b, share=share):
                return a + share * (b - a)

            entering = {
                "embeds": mixed(base[2]["embeds"], source[2]["embeds"]),
                "features": [mixed(a, b) for a, b in zip(base[2]["features"], source[2]["features"], strict=True)],
            }
        _, zeros, _, logits = plain_run(model, inputs, site, entering)
        for kept, gradient in zip(total, torch.autograd.grad(measure(logits, clean_logits).sum(), zeros), strict=True):
            kept += gradient.double() / (points or 1)
    real = two[0].inputs["attention_mask"].bool()
    rows = real if positions is None else real & two[0].mask(positions)
    products = torch.stack([(t * c.double()).flatten(2) * rows[..., None] for t, c in zip(total, change, strict=True)])
    sign = 1 if forth else -1
    return sign * products / (whole if normalise else len(real))


def by_head(products: Tensor, heads: int) -> Tensor:
    return products.unflatten(-1, (heads, HEAD_DIM)).sum((1, 2, 4))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.abs().max()), rtol=2e-3)


@pytest.mark.parametrize("site", HEAD_SITES)
@pytest.mark.parametrize("kind", ["sample", "batch"])
def test_heads(family, site, kind):
    two, forth = pair(family, kind), kind == "batch"
    found = AttributionPatching(site, direction="denoising" if forth else "noising").run(
        wrapped(family), [two], objective=DIFFERENCE, progress=False
    )
    expected = by_head(plain_attribution(family, two, site, forth), HEAD_SITES[site])
    close(found.values, expected.repeat_interleave(HEADS // HEAD_SITES[site], dim=1))
    assert found.name == f"AttributionPatching({site})"
    assert found.provenance["config"]["integrated"] is None and found.provenance["n_samples"] == len(
        two[0].inputs["input_ids"]
    )


@pytest.mark.parametrize("site", STREAM_SITES)
def test_places_in_the_stream(family, site):
    two = pair(family)
    expected = plain_attribution(family, two, site, True).sum((1, 3))
    run = {"objective": DIFFERENCE, "progress": False}
    table = AttributionPatching(site).run(wrapped(family), two, **run)
    close(table.values, expected)
    kinds = AttributionPatching(site, by="kind").run(wrapped(family), two, **run)
    masks = {"target": two[0].target_mask, "question": two[0].layout.question}
    for column, name in enumerate(kinds.places):
        if name in masks:
            close(kinds.values[:, column], expected[:, masks[name]].sum(1))
    whole = AttributionPatching(site, by="layer", layers=[0, 2]).run(wrapped(family), two, **run)
    assert whole.shape == (2, 1) and whole.layers == (0, 2)
    close(whole.values[:, 0], expected.sum(1)[[0, 2]])
    close(kinds.values.sum(1), expected.sum(1))


def test_integrated_gradients_between_the_embeddings(family):
    two = pair(family, "batch")
    found = {
        direction: AttributionPatching(direction=direction, integrated=3).run(
            wrapped(family), two, objective=DIFFERENCE, progress=False
        )
        for direction in ("denoising", "noising")
    }
    close(found["denoising"].values, by_head(plain_attribution(family, two, "z", True, points=3), HEADS))
    close(found["noising"].values, found["denoising"].values)


@pytest.mark.parametrize("name", ["llava_onevision", "internvl"])  # nothing enters behind the embeddings
def test_all_that_enters_adds_up_to_the_whole_difference(name):
    run = {"objective": DIFFERENCE, "progress": False}
    whole = AttributionPatching("resid_pre", by="layer", layers=0, integrated=32).run(wrapped(name), pair(name), **run)
    assert whole.values.item() == pytest.approx(1.0, abs=0.03)


def test_padding_adds_nothing(family):
    clean, corrupted = pair(family, "batch")
    metric, run = AttributionPatching(normalise=False), {"objective": DIFFERENCE, "progress": False}
    alone = metric.run(wrapped(family), list(zip(clean, corrupted, strict=True)), **run)
    close(metric.run(wrapped(family), (clean, corrupted), **run).values, alone.values)


def test_divergence_positions_and_unnormalised_pairs():
    two, model = pair("qwen3_vl"), wrapped("qwen3_vl")
    found = AttributionPatching(positions="visual").run(model, two, objective=KLDivergence(), progress=False)
    close(found.values, by_head(plain_attribution("qwen3_vl", two, "z", True, divergence, positions="visual"), HEADS))
    pairs = [two, pair("qwen3_vl", "batch")]
    found = AttributionPatching(normalise=False).run(model, pairs, objective=DIFFERENCE, progress=False)
    first, second = (by_head(plain_attribution("qwen3_vl", p, "z", True, normalise=False), HEADS) for p in pairs)
    close(found.values, (first + 2 * second) / 3)  # a mean over samples, of which the batch has two


@pytest.mark.parametrize(
    ("site", "edited"), [("rot_q", "attn.hook_rot_q"), ("rot_k", "attn.hook_rot_k"), ("resid_mid", "hook_resid_mid")]
)
def test_sites_without_a_module_follow_small_steps(site, edited):
    model, two = wrapped("qwen3_vl", dtype=torch.float64), pair("qwen3_vl")
    name = f"blocks.1.{edited}"
    _, source = model.run_with_cache(two[0], name)
    _, own = model.run_with_cache(two[1], name)

    def value(step):
        move = step * (source[name] - own[name])
        logits = model.run_with_hooks(two[1], fwd_hooks=[(name, lambda x, hook: x + move)])
        return float(difference(logits[:, -1], None))

    slope = (value(1e-3) - value(-1e-3)) / 2e-3
    by = {"by": "layer"} if site == "resid_mid" else {}
    found = AttributionPatching(site, normalise=False, layers=1, **by).run(
        model, two, objective=DIFFERENCE, progress=False
    )
    total = found.values.nansum() / (HEADS // KV_HEADS if site == "rot_k" else 1)
    assert float(total) == pytest.approx(slope, rel=1e-3)


# -- against real patching ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
    task = VisualRetrieval(seed=11, pages=1, filler=8)
    pairs = [(s, corruptions.MeanRegion()(model, s)) for s in task.samples(model, 2, answer=True)]
    return model, pairs, LogitDifference(wrong=task.answers)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_it_ranks_the_toys_heads_as_patching_does(toy, direction):
    model, pairs, objective = toy
    how = {"objective": objective, "progress": False}
    real = PatchingEffect("z", direction=direction).run(model, pairs, **how)
    found = AttributionPatching("z", direction=direction).run(model, pairs, **how)
    assert found.spearman(real) > 0.85
    assert found.top(4) == real.top(4) and {str(h) for h in str(found.top(4)).split(", ")} == {
        "L2H4",
        "L2H5",
        "L2H6",
        "L2H7",
    }
    mixed = AttributionPatching("z", direction=direction, integrated=2).run(model, pairs, **how)
    assert mixed.top(4) == real.top(4)


def test_bfloat16_finds_the_same_heads(toy):
    _, pairs, objective = toy
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="bfloat16")
    found = AttributionPatching().run(model, pairs, objective=objective, progress=False)
    due = AttributionPatching().run(toy[0], pairs, objective=objective, progress=False)
    assert found.top(4) == due.top(4)
    assert found["L2H6"] == pytest.approx(due["L2H6"], rel=0.15)


# -- what it leaves, and what is rejected ------------------------------------------------------------------------------


def test_parameters_and_hooks_stay_as_they_are():
    model, two = wrapped("internvl"), pair("internvl")
    run = {"objective": DIFFERENCE, "progress": False}
    due = AttributionPatching().run(model, two, **run)
    model.hf_model.requires_grad_(True)
    try:
        assert AttributionPatching(integrated=1).run(model, two, **run) != due
        assert AttributionPatching().run(model, two, **run) == due
        assert all(p.requires_grad and p.grad is None for p in model.hf_model.parameters())
    finally:
        model.hf_model.requires_grad_(False)
    detached = FunctionObjective(lambda logits: logits[:, 0, CORRECT].detach())
    with pytest.raises(HookValueError, match="no gradient"):
        AttributionPatching(integrated=1).run(model, two, objective=detached, progress=False)
    assert not model.list_hooks()


def test_a_checkpoint_saves_what_is_known(tmp_path, monkeypatch):
    model, pairs = wrapped("internvl"), [pair("internvl"), pair("internvl", "batch")]
    run = {"objective": DIFFERENCE, "progress": False}
    due = AttributionPatching().run(model, pairs, **run)
    assert AttributionPatching().run(model, pairs, **run, checkpoint=tmp_path / "a") == due
    monkeypatch.setattr(Products, "add", lambda *_, **__: pytest.fail("all was known"))
    assert AttributionPatching().run(model, pairs, **run, checkpoint=tmp_path / "a") == due


def test_settings_that_do_not_do():
    with pytest.raises(HookValueError, match="N x N memory"):
        AttributionPatching("pattern")
    with pytest.raises(HookValueError, match="at least 1, or None; got 0"):
        AttributionPatching(integrated=0)
    model, two = wrapped("qwen3_vl"), pair("qwen3_vl")
    with pytest.raises(HookValueError, match="no gradient: use LogitDifference"):
        AttributionPatching().run(model, two, objective=GreedyAccuracy())
    with pytest.raises(HookValueError, match="has its minimum in the clean run"):
        AttributionPatching(direction="noising").run(model, two, objective=KLDivergence())
    mixed = batch("qwen3_vl", "left", 0), batch("qwen3_vl", "right", 3)
    with pytest.raises(LayoutError, match="different sides"):
        AttributionPatching().run(model, mixed, objective=DIFFERENCE, progress=False)


def test_gradients_that_overflow():
    model, two = wrapped("qwen3_vl"), pair("qwen3_vl")
    huge = FunctionObjective(lambda logits: (logits[:, 0, CORRECT] * 1e38) * 1e38)
    with pytest.raises(NumericsError, match="not finite"):
        AttributionPatching().run(model, two, objective=huge, progress=False)

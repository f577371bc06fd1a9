"""PathPatching against the three runs made by bare torch hooks on the plain model."""

import pytest
import torch

from helpers.intervention_witness import listen, sample
from helpers.tiny import FAMILIES, HEAD_DIM, HEADS, KV_HEADS
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm.errors import HeadError, HookValueError
from hooked_mllm.metrics import PathPatching
from hooked_mllm.objectives import LogitDifference

DIFFERENCE = LogitDifference(5, wrong=9)


def pair(family):
    return sample(family, 0, 0), sample(family, 1, 0)


def block(family, layer):
    return plain(family).model.language_model.layers[layer]


def run(family, inputs, *hooks):
    """Objective of a run; hooks are (module, side, fn)."""
    handles = [listen(*hook) for hook in hooks]
    with torch.no_grad():
        logits = plain(family)(**inputs.inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return float((logits[:, -1, 5] - logits[:, -1, 9]).double().sum())


def recorded(family, inputs, modules):
    kept = {}
    run(
        family,
        inputs,
        *[(m, side, lambda x, key=key: kept.__setitem__(key, x.clone())) for key, (m, side) in modules.items()],
    )
    return kept


def columns(head):
    return slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)


def second_run(family, base, z_base, z_source, mlp_base, layer, head, freeze_mlps, modules):
    """The base run, the sender's z from the source, later heads (and MLPs) held: its end, and what `modules` see."""

    def sender(x):
        x = x.clone()
        x[..., columns(head)] = z_source[layer][..., columns(head)]
        return x

    hooks = [(block(family, layer).self_attn.o_proj, "in", sender)]
    for later in range(layer + 1, LAYERS):
        hooks.append((block(family, later).self_attn.o_proj, "in", lambda x, l=later: z_base[l]))
    if freeze_mlps:
        hooks += [(block(family, later).mlp, "out", lambda x, l=later: mlp_base[l]) for later in range(layer, LAYERS)]
    kept = {}
    hooks += [(m, side, lambda x, key=key: kept.__setitem__(key, x.clone())) for key, (m, side) in modules.items()]
    return run(family, base, *hooks), kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("direction", "freeze"), [("noising", False), ("denoising", True)])
def test_straight_to_the_logits(family, direction, freeze):
    clean, corrupted = pair(family)
    base, source = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    sites = {layer: (block(family, layer).self_attn.o_proj, "in") for layer in range(LAYERS)}
    z_base, z_source = recorded(family, base, sites), recorded(family, source, sites)
    mlp_base = recorded(family, base, {layer: (block(family, layer).mlp, "out") for layer in range(LAYERS)})
    a, b, start = run(family, clean), run(family, corrupted), run(family, base)
    got = PathPatching("logits", direction=direction, freeze_mlps=freeze).run(
        wrapped(family), (clean, corrupted), objective=DIFFERENCE, progress=False
    )
    sign = -1 if direction == "noising" else 1
    for layer in range(LAYERS):
        for head in range(HEADS):
            end, _ = second_run(family, base, z_base, z_source, mlp_base, layer, head, freeze, {})
            assert got[layer, head] == pytest.approx(sign * (end - start) / (a - b), abs=2e-4 / abs(a - b))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", [("q",), ("k", "v")])
def test_to_receiving_heads(family, inputs):
    clean, corrupted = pair(family)
    receivers = [(1, 1), (2, 3)]
    sites = {layer: (block(family, layer).self_attn.o_proj, "in") for layer in range(LAYERS)}
    z_base, z_source = recorded(family, clean, sites), recorded(family, corrupted, sites)
    taps = {(r, i): (getattr(block(family, r).self_attn, f"{i}_proj"), "out") for r, _ in receivers for i in inputs}
    a, b = run(family, clean), run(family, corrupted)
    got = PathPatching(receivers, inputs=inputs).run(
        wrapped(family), (clean, corrupted), objective=DIFFERENCE, progress=False
    )
    assert got.missing == (2,)
    groups, seen = HEADS // KV_HEADS, []
    for layer in range(2):
        for head in range(HEADS):
            _, kept = second_run(family, clean, z_base, z_source, {}, layer, head, False, taps)
            hooks = []
            for receiver, own in receivers:
                if receiver <= layer:
                    continue
                for name in inputs:

                    def put(x, own=own if name == "q" else own // groups, value=kept[receiver, name]):
                        x = x.clone()
                        x[..., columns(own)] = value[..., columns(own)]
                        return x

                    hooks.append((taps[receiver, name][0], "out", put))
            expected = -(run(family, clean, *hooks) - a) / (a - b)
            seen.append(expected)
            assert got[layer, head] == pytest.approx(expected, abs=2e-4 / abs(a - b))
    assert max(map(abs, seen)) * abs(a - b) > 1e-3


def test_nothing_stays_on_the_model():
    model, both = wrapped("qwen3_vl"), pair("qwen3_vl")
    before = model(both[0])
    PathPatching([(2, 0)], inputs="q").run(model, both, objective=DIFFERENCE, progress=False)
    assert model.list_hooks() == {}
    assert torch.equal(before, model(both[0]))


def test_bad_input():
    model, both = wrapped("qwen3_vl"), pair("qwen3_vl")
    with pytest.raises(HeadError, match="layer 0"):
        PathPatching([(0, 1)]).run(model, both, objective=DIFFERENCE, progress=False)
    with pytest.raises(HeadError, match="empty"):
        PathPatching([])
    with pytest.raises(HeadError):
        PathPatching([(LAYERS, 0)]).run(model, both, objective=DIFFERENCE, progress=False)
    with pytest.raises(HookValueError, match="inputs"):
        PathPatching([(1, 0)], inputs=["z"])
    with pytest.raises(HookValueError, match="direction"):
        PathPatching("logits", direction="both")

"""Interventions, hybrid attention and hook points with right arguments, for `helpers.odd_doors`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

import hooked_mllm as hm
from helpers.odd_values import Door, keeping


def of_edits(model, sample, other, cache, some) -> Iterator[Door]:
    def edited(kind: type) -> Callable[..., Any]:
        def run(*args: Any, **arguments: Any) -> Any:
            with model.intervene(kind(*args, **arguments)):
                return model(sample)

        return run

    reference = hm.HeadAblation.reference(model, [sample, other], some)
    source = torch.zeros(1, sample.layout.last_index + 1, model.cfg.n_heads, model.cfg.d_head)
    yield Door(
        "HeadAblation",
        edited(hm.HeadAblation),
        16,
        heads=some,
        mode="zero",
        phase="both",
        positions="question",
        tower="text",
    )
    for name, value, mode in (
        ("reference", reference, "mean"),
        ("factor", 0.5, "scale"),
        ("positions", "question", "zero"),
    ):
        yield Door(
            "HeadAblation", keeping(edited(hm.HeadAblation), heads=some, mode=mode, phase="both"), 16, **{name: value}
        )
    yield Door(
        "reference",
        hm.HeadAblation.reference,
        8,
        model=model,
        samples=[sample, other],
        heads=some,
        positions="question",
        tower="text",
        keep_tokens=False,
    )
    yield Door(
        "AttentionKnockout",
        edited(hm.AttentionKnockout),
        12,
        heads=some,
        queries="question",
        keys="visual",
        phase="both",
        tower="text",
    )
    yield Door("AttentionKnockout", keeping(edited(hm.AttentionKnockout), keys="visual", phase="both"), 16, layers=[1])
    yield Door(
        "HeadPatch",
        edited(hm.HeadPatch),
        10,
        heads=some,
        source=cache,
        positions="question",
        source_positions="question",
        tower="text",
    )
    yield Door(
        "ActivationPatch",
        edited(hm.ActivationPatch),
        10,
        site="resid_post",
        source=cache,
        layers=[1],
        positions="question",
        source_positions="question",
        tower="text",
    )
    yield Door(
        "ActivationPatch", keeping(edited(hm.ActivationPatch), site="z", source=source, layers=[2]), 16, heads=[1]
    )
    yield Door(
        "Steer",
        edited(hm.Steer),
        12,
        direction=torch.ones(model.cfg.d_model),
        layer=1,
        positions="question",
        coefficient=1.0,
        phase="both",
        site="resid_post",
        tower="text",
    )
    yield Door(
        "HybridAttention", edited_attention(model, sample), 12, dense=some, sink=4, window=8, implementation="auto"
    )
    yield Door(
        "register_hybrid_attention",
        hm.register_hybrid_attention,
        12,
        name="odd",
        heads=some,
        sink=4,
        window=8,
        implementation="auto",
    )
    right = {"name": "x", "tower": "text", "block": 0, "on_change": None}
    yield Door("HookPoint", hm.HookPoint, **right)


def edited_attention(model, sample) -> Callable[..., Any]:
    def run(dense: Any, **arguments: Any) -> Any:
        with model.attention(hm.HybridAttention(dense, **arguments)):
            return model(sample)

    return run

"""The public callables with right arguments: metrics, objectives, corruptions and plots; see `helpers.odd_calls`."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import hooked_mllm as hm
from helpers.odd_values import DATA, Door, listed
from hooked_mllm import corruptions, datasets, metrics, objectives, plots, toys
from hooked_mllm.metrics import functional, literature


def of_metrics(model, sample, answered, scores, some) -> Iterator[Door]:
    def measured(kind: type, on: Any = sample) -> Callable[..., Any]:
        return lambda **arguments: model.measure([on], kind(**arguments), progress=False)

    yield Door("RetrievalAttentionMass", measured(metrics.RetrievalAttentionMass), 16, queries="question")
    yield Door("VisionMass", measured(metrics.VisionMass), 16, queries="question")
    yield Door(
        "AttentionScore",
        measured(metrics.AttentionScore),
        10,
        queries="question",
        keys="target",
        reduce="sum",
        over_samples="mean",
        share=0.05,
        select=0.05,
    )
    yield Door("KeyTokenRatio", measured(metrics.KeyTokenRatio), 12, share=0.05, hit=0.5, queries="question")
    yield Door("KeyTokenCoverage", measured(metrics.KeyTokenCoverage), 12, ranking=scores, ks=[1, 2], share=0.05)
    yield Door(
        "LocalizationHeads",
        measured(metrics.LocalizationHeads),
        10,
        lowest=10,
        skip_layers=2,
        queries="last",
        image=0,
        view=None,
    )
    yield Door("GazeHeads", measured(metrics.GazeHeads), 10, queries="last")
    null = [
        each for pair in metrics.NullQuery().pairs(model, [sample]) for each in (pair if type(pair) is list else [pair])
    ]
    yield Door("QRHead", measured(metrics.QRHead, null[0]), 10, queries="question", outlier=2.0)
    yield Door("RetrievalHeads", measured(metrics.RetrievalHeads, answered), 10, keys="question", released_code=False)
    yield Door("VisualNonSinkRatio", measured(metrics.VisualNonSinkRatio), 10, dims=[0], tau=20.0, queries="last")
    yield Door("ParaphraseConsistency", metrics.ParaphraseConsistency, wordings=2, queries="question", share=0.01)
    yield Door("QuestionContrast", metrics.QuestionContrast, queries="question", share=0.01)
    goal = objectives.LogitDifference(3, 4)
    effect = {"model": model, "samples": [sample], "objective": goal, "progress": False}

    def ran(kind: type, **on: Any) -> Callable[..., Any]:
        return lambda **arguments: kind(**arguments).run(**on)

    right = {"mode": "zero", "phase": "both", "positions": "question", "layers": [1]}
    yield Door("AblationEffect", ran(metrics.AblationEffect, **effect), 6, **right)
    narrow = metrics.AblationEffect(mode="zero", phase="both", layers=[1])
    yield Door("AblationEffect.run", narrow.run, 6, **effect, per_sample=False, batch_size=2)
    yield Door(
        "AblationCurve",
        ran(metrics.AblationCurve, **effect),
        5,
        scores=scores,
        ks=[1],
        mode="zero",
        phase="both",
        rankings=("top",),
        seeds=(0,),
    )
    yield Door(
        "AblationCurve.run", metrics.AblationCurve(scores, [1], rankings=("top",)).run, 6, **effect, batch_size=2
    )
    pairs = {"model": model, "pairs": [(sample, sample)], "objective": goal, "progress": False}
    for kind in (metrics.PatchingEffect, metrics.AttributionPatching):
        yield Door(
            kind.__name__,
            ran(kind, **pairs),
            5,
            site="resid_pre",
            direction="denoising",
            layers=[1],
            by="kind",
            normalise=False,
        )
        yield Door(f"{kind.__name__}.run", kind("resid_pre", layers=[1], normalise=False).run, 6, **pairs)
    yield Door(
        "PathPatching",
        ran(metrics.PathPatching, **pairs),
        4,
        receivers="L5H1",
        inputs=("q",),
        freeze_mlps=False,
        direction="noising",
        normalise=False,
    )
    attribution = {"model": model, "samples": [sample], "progress": False}
    yield Door("DirectLogitAttribution", ran(metrics.DirectLogitAttribution, **attribution), 9, correct=3, wrong=4)
    yield Door("DirectLogitAttribution.run", metrics.DirectLogitAttribution(3, 4).run, 6, **attribution)
    yield Door("NullQuery", metrics.NullQuery, text="N/A", reuse_prefix=True)
    yield Door("NullQuery.pairs", listed(metrics.NullQuery().pairs), 8, model=model, samples=[sample])
    yield Door("DuoGate", metrics.DuoGate, sink=4, recent=8, steps=1, lr=0.02, l1=0.05, positions="suffix", seed=0)
    yield Door("GradientAgreement", metrics.GradientAgreement, rule="norm", queries="question", n_tokens=1)
    yield Door("GradientAgreement.run", metrics.GradientAgreement().run, 5, **attribution)
    yield Door(
        "OcclusionAgreement",
        metrics.OcclusionAgreement,
        window=None,
        refine=2,
        batch_size=8,
        queries="question",
        n_tokens=1,
    )
    yield Door(
        "CausalTable", metrics.CausalTable, values=[[0.1, 0.2]], places=["a", "b"], layers=[0], name="x", provenance={}
    )
    yield Door("CoverageCurve", metrics.CoverageCurve, ks=[1, 2], coverage=[0.1, 0.2], n_samples=3, share=0.05)
    pattern, queries, keys = torch.rand(1, 2, 3, 4), torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    yield Door("attention_mass", functional.attention_mass, pattern=pattern, queries=queries, keys=keys)
    yield Door("attention_profile", functional.attention_profile, pattern=pattern, queries=queries)
    yield Door("key_tokens", functional.key_tokens, profile=torch.rand(1, 2, 4), share=0.5)
    yield Door("key_token_ratio", functional.key_token_ratio, profile=torch.rand(1, 2, 4), target=keys, share=0.5)
    yield Door("massive_dims", literature.massive_dims, residual=torch.rand(1, 4, 8), k=2)
    yield Door("spatial_entropy", literature.spatial_entropy, attention=np.eye(4))
    yield Door("token_grid", literature.token_grid, layout=sample.layout, image=0, view=None)


def of_objectives(model, sample, picture, folder) -> Iterator[Door]:
    yield Door("LogitDifference", objectives.LogitDifference, correct=3, wrong=4)
    yield Door("AnswerLogProb", objectives.AnswerLogProb, answer="red")
    yield Door("KLDivergence", objectives.KLDivergence, positions="last")
    yield Door("FunctionObjective", objectives.FunctionObjective, fn=lambda logits: logits[:, 0, 0], positions="last")
    yield Door("gather_logits", objectives.gather_logits, logits=torch.rand(1, 3, 5), positions=torch.tensor([[1]]))
    yield Door("as_objective", objectives.as_objective, value=objectives.KLDivergence())
    yield Door(
        "objective_values",
        objectives.objective_values,
        8,
        model=model,
        inputs=sample,
        objective=objectives.LogitDifference(3, 4),
    )
    yield Door("logits_at", objectives.logits_at, 8, model=model, inputs=sample, positions=torch.tensor([[5]]))
    for name, kind, right in (
        ("BlurRegion", corruptions.BlurRegion, {"sigma": 2.0, "region": "target"}),
        ("MeanRegion", corruptions.MeanRegion, {"region": "target", "of": "rest"}),
        ("ImageNoise", corruptions.ImageNoise, {"std": 50.0, "region": None, "seed": 0}),
        ("OtherImage", corruptions.OtherImage, {"images": [picture], "seed": 0, "resize": True}),
        ("OtherQuestion", corruptions.OtherQuestion, {"text": "what color is the cross ?"}),
        ("SwapRegion", corruptions.SwapRegion, {"box": hm.Box(32, 32, 48, 48), "seed": 0}),
    ):
        yield Door(name, lambda kind=kind, **arguments: kind(**arguments)(model, sample), 12, **right)
    yield Door("check_pair", corruptions.check_pair, clean=sample, corrupted=sample)
    yield Door("VisualRetrieval", toys.VisualRetrieval, seed=0, pages=1, filler=4, split="test", objects=4)
    yield Door("VideoRetrieval", toys.VideoRetrieval, seed=0, moments=2, filler=4, split="test", shapes=2)
    yield Door("examples", toys.VisualRetrieval(pages=1).examples, n=1, start=0)
    yield Door("samples", toys.VisualRetrieval(pages=1).samples, 10, model=model, n=1, start=0, answer=False)
    yield Door("toys.path", toys.path, name="toy-qwen3-vl")
    yield Door(
        "RefCOCOg",
        datasets.RefCOCOg,
        folder=DATA / "refcocog",
        split_by="sample",
        split="test",
        max_samples=2,
        seed=0,
        question="Where is {expression}?",
        images=DATA / "refcocog" / "images",
    )
    (folder / "x.p").write_bytes(b"N.")
    yield Door("load_plain_pickle", datasets.load_plain_pickle, path=folder / "x.p")


def of_plots(sample, scores, some, model) -> Iterator[Door]:
    values = torch.rand(len(sample.layout.visual))
    yield Door("head_map", plots.head_map, scores=scores, top=3, title="a", vmin=0.0, vmax=1.0, cmap="viridis")
    yield Door("head_maps", plots.head_maps, scores=[scores], top=3, titles=["a"], title="a")
    yield Door("scatter", plots.scatter, x=scores, y=scores, label=5, diagonal=False, title="a")
    yield Door(
        "overlay",
        plots.overlay,
        12,
        sample=sample,
        values=values,
        image=0,
        frame=0,
        target=True,
        title="a",
        vmin=0.0,
        vmax=1.0,
        cmap="viridis",
        opacity=0.85,
    )
    yield Door(
        "overlay_grid", plots.overlay_grid, 8, sample=sample, values={"a": values}, columns=4, title="a", panel=2.6
    )
    yield Door("pair", plots.pair, 8, clean=sample, corrupted=sample, image=0, target=True, title="a", panel=3.2)
    yield Door("group_bars", plots.group_bars, groups={"a": {"b": [0.5]}}, ylabel="a", title="a")
    yield Door("coverage_curve", plots.coverage_curve, curves={"a": [0.1, 0.2]}, ks=[1, 2], title="a")
    goal = objectives.LogitDifference(3, 4)
    run = metrics.AblationCurve(scores, [1], rankings=("top",)).run
    curve = run(model, [sample], objective=goal, progress=False)
    yield Door("ablation_curves", plots.ablation_curves, curves={"a": curve}, chance=0.1, level=0.95, title="a")
    table = metrics.CausalTable([[0.1, 0.2]], places=["a", "b"])
    yield Door("table_map", plots.table_map, table=table, title="a", cmap="viridis")
    found = metrics.stability({"a": scores, "b": scores})
    yield Door("stability_map", plots.stability_map, stability=found, title="a")
    yield Door("prefill", plots.prefill, times={"a": {8: 1.0}}, base="a", title="a")

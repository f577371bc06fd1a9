"""What metrics of many runs share: a checkpoint that cannot be written is reported before any sample is prepared."""

import numpy as np
import pytest
import torch

from helpers.intervention_witness import sample
from helpers.wrapped import wrapped
from hooked_mllm import HeadScores, HookedMLLM, corruptions, toys
from hooked_mllm.errors import CacheFileError
from hooked_mllm.metrics import (
    AblationCurve,
    AblationEffect,
    AttributionPatching,
    DuoGate,
    PatchingEffect,
    PathPatching,
)
from hooked_mllm.objectives import AnswerLogProb, FunctionObjective, KLDivergence

OBJECTIVE = {"objective": AnswerLogProb()}
METRICS = {
    "AblationCurve": (AblationCurve(HeadScores(torch.rand(3, 4)), ks=[0, 2]), OBJECTIVE),
    "AblationEffect": (AblationEffect(mode="zero", phase="prefill"), OBJECTIVE),
    "PatchingEffect": (PatchingEffect(), OBJECTIVE),
    "AttributionPatching": (AttributionPatching(), OBJECTIVE),
    "PathPatching": (PathPatching("logits"), OBJECTIVE),
    "DuoGate": (DuoGate(steps=1), {}),
}


@pytest.mark.parametrize("name", METRICS)
def test_the_checkpoint_can_be_written_or_no_sample_is_prepared(tmp_path, name):
    def samples():
        pytest.fail("a sample was prepared")
        yield

    metric, options = METRICS[name]
    (tmp_path / "file").write_text("kept")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "state", "a part of the path is a file")):
        with pytest.raises(CacheFileError, match=f"cannot be written: .*{message}"):
            metric.run(wrapped("qwen3_vl"), samples(), checkpoint=path, progress=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


PATCHES = {
    f"{kind.__name__}-{direction}-{normalise}": kind(*arguments, direction=direction, normalise=normalise)
    for kind, arguments in ((PatchingEffect, ()), (AttributionPatching, ()), (PathPatching, ("logits",)))
    for direction in ("denoising", "noising")
    for normalise in (True, False)
}


def gap(logits):
    return logits[:, 0, 5] - logits[:, 0, 9]


def loss(logits):
    return -gap(logits)


@pytest.mark.parametrize("name", [*PATCHES, "AblationEffect"])
def test_a_loss_gives_the_effects_of_its_negative(name):
    """The same measure of the model, once as the better the larger and once as the better the smaller."""
    metric = PATCHES.get(name, AblationEffect(mode="zero", phase="prefill"))
    clean, corrupted = sample("qwen3_vl", 0, 0), sample("qwen3_vl", 1, 0)
    inputs = (clean, corrupted) if name in PATCHES else clean
    objectives = (gap, FunctionObjective(loss, larger_is_better=False))
    larger, smaller = (
        metric.run(wrapped("qwen3_vl"), inputs, objective=objective, progress=False) for objective in objectives
    )
    np.testing.assert_allclose(smaller.values, larger.values, rtol=1e-4, atol=1e-6)
    assert float(larger.values.abs().max()) > 1e-4


@pytest.mark.parametrize("kind", [PatchingEffect, AttributionPatching])
def test_the_heads_that_bring_a_toy_back_lead_without_normalisation_too(kind):
    model, task = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32"), toys.VisualRetrieval(pages=1)
    pairs = [(s, corruptions.MeanRegion()(model, s)) for s in task.samples(model, 2, answer=True)]
    share, plain = (
        kind(normalise=n).run(model, pairs, objective=KLDivergence(), progress=False) for n in (True, False)
    )
    assert plain.ranking == share.ranking and list(plain.top(3)) == list(share.top(3)) and plain["L2H7"] > 1
    np.testing.assert_allclose(plain.values / share.values, plain.provenance["corrupted"], rtol=1e-6)


def test_the_provenance_contains_the_corrupted_run():
    model = HookedMLLM.from_pretrained("toy-qwen3-vl")
    clean = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
    facts = []
    for corruption in (corruptions.ImageNoise(0.5), corruptions.ImageNoise(0.25)):
        pair = clean, corruption(model, clean)
        facts.append(PatchingEffect(layers=0).run(model, pair, progress=False, **OBJECTIVE).provenance)
    assert facts[0]["corrupted_ids"] == [clean.id] or clean.id is None
    assert facts[0]["corrupted_inputs"] != facts[1]["corrupted_inputs"]
    assert {k for k in facts[0] if facts[0][k] != facts[1][k]} <= {"corrupted_inputs", "corrupted"}


def test_settings_of_numpy_are_kept_in_a_checkpoint(tmp_path):
    metric = AttributionPatching(integrated=np.int64(2))
    assert type(metric.integrated) is int
    scale = AblationEffect(mode="scale", phase="prefill", factor=np.float32(0.5))
    options = {"objective": FunctionObjective(lambda logits: logits[:, 0, 5]), "progress": False}
    scores = scale.run(wrapped("qwen3_vl"), sample("qwen3_vl"), checkpoint=tmp_path / "state", **options)
    assert scores.provenance["config"]["factor"] == 0.5 and (tmp_path / "state").is_file()

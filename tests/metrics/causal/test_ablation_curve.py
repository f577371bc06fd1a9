"""Ablation curves against bare torch hooks on an unwrapped model, and against greedy generation of the toys."""

import re

import numpy as np
import pytest
import torch

from helpers.intervention_witness import QUESTIONS, z_replaced
from helpers.tiny import HEAD_DIM, HEADS, tiny_image
from helpers.wrapped import LAYERS, noise, wrapped
from hooked_mllm import HeadAblation, HeadScores, HookedMLLM, SampleBatch
from hooked_mllm.errors import CacheFileError, HeadError, HookValueError, InputError, NumericsError
from hooked_mllm.metrics import AblationCurve
from hooked_mllm.objectives import AnswerLogProb, KLDivergence
from hooked_mllm.toys import VisualRetrieval

SCORES = HeadScores(noise(torch.zeros(LAYERS, HEADS), seed=5), name="made up")
ANSWERS = ("The red mug", "dog", "No")


@pytest.fixture(scope="module")
def samples():
    """Three unequal samples with unequal answers, by family."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = [
                wrapped(family).prepare(
                    QUESTIONS[i % 2], images=tiny_image(32, 24 + 4 * (i == 1), seed=i), answer=answer, id=f"s{i}"
                )
                for i, answer in enumerate(ANSWERS)
            ]
        return made[family]

    return of


@torch.no_grad()
def log_p(family, sample, heads, phase, value=0.0):
    """Sum of the log-probabilities of the answer's tokens, one sample at a time, with plain transformers."""
    answer = sample.mask("answer")
    there = {"prefill": ~answer, "decode": answer, "both": torch.ones_like(answer)}[phase]

    def change(z, layer):
        for l, h in heads:
            if l == layer:
                new = torch.as_tensor(value).expand(LAYERS, HEADS, HEAD_DIM)[l, h]
                z[:, :, h] = torch.where(there[..., None], new, z[:, :, h])
        return z

    with z_replaced(family, change) as model:
        logits = model(**sample.inputs).logits[0].double()
    (at,) = answer[0].nonzero(as_tuple=True)
    return float(logits.log_softmax(-1)[at - 1, sample.inputs["input_ids"][0, at]].sum())


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_it_equals_a_plain_loop_with_bare_hooks(family, samples, phase):
    curve = AblationCurve(SCORES, ks=[3, 0, 7], phase=phase, seeds=[4, 2])
    found = curve.run(wrapped(family), samples(family), objective=AnswerLogProb(), batch_size=2, progress=False)
    order = sorted((-float(SCORES.values[l, h]), l, h) for l in range(LAYERS) for h in range(HEADS))
    order = [(l, h) for _, l, h in order]
    assert found.ks == (0, 3, 7) and found.rankings == ("top", "bottom", "random")
    for i, sample in enumerate(samples(family)):
        clean = log_p(family, sample, [], phase)
        for ranking, heads in (("top", order), ("bottom", order[::-1])):
            expected = [clean, log_p(family, sample, heads[:3], phase), log_p(family, sample, heads[:7], phase)]
            np.testing.assert_allclose(found.per_sample[ranking][0, :, i], expected, atol=2e-3)
            assert max(abs(e - clean) for e in expected) > 0.02
        for seed in (0, 1):
            drawn = [tuple(map(int, h)) for h in re.findall(r"L(\d+)H(\d+)", found.heads["random"][seed][1])]
            assert len(drawn) == 3 and not set(drawn) & set(order[:3])
            got = found.per_sample["random"][seed, :2, i]
            np.testing.assert_allclose(got, [clean, log_p(family, sample, drawn, phase)], atol=2e-3)
    assert np.isnan(found.per_sample["random"][:, 2]).all()  # 5 heads are left of 12: no control of 7
    assert found.heads["random"][0][2] is None and found.moved[0][2] is None
    facts = found.provenance
    assert facts["sample_ids"] == ["s0", "s1", "s2"] and facts["config"]["phase"] == phase
    assert facts["ranking"]["name"] == "made up" and found.objective == "AnswerLogProb"


def test_mean_ablation_and_shares(samples):
    means = noise(torch.zeros(LAYERS, HEADS, HEAD_DIM), seed=8)
    curve = AblationCurve(SCORES, ks=[0.25], mode="mean", reference=means, rankings=["top"])
    found = curve.run(wrapped("internvl"), samples("internvl"), objective=AnswerLogProb(), progress=False)
    assert found.ks == (3,) and found.clean is None
    for i, sample in enumerate(samples("internvl")):
        expected = log_p("internvl", sample, SCORES.top(3), "both", means)
        assert found.per_sample["top"][0, 0, i] == pytest.approx(expected, abs=2e-3)


def test_an_objective_that_compares_with_the_clean_run(samples):
    curve = AblationCurve(SCORES, ks=[0, 6], rankings=["top", "bottom"])
    found = curve.run(wrapped("qwen3_vl"), samples("qwen3_vl"), objective=KLDivergence(), progress=False)
    assert not found.larger_is_better
    assert abs(found.per_sample["top"][0, 0]).max() < 1e-6 and found.per_sample["top"][0, 1].min() > 1e-3


@pytest.mark.parametrize("name", ["toy-qwen3-vl", "toy-llava-onevision", "toy-internvl"])
def test_greedy_accuracy_is_what_generation_gives(name):
    """For answers that the model itself gives under one of the ablations, in all phases."""
    model = HookedMLLM.from_pretrained(name, dtype="float32", check=False)
    task = VisualRetrieval(seed=5, pages=1, filler=3)
    scores = HeadScores(noise(torch.zeros(6, 8), seed=1))
    plain, sets = task.samples(model, 3), [scores.top(k) for k in (0, 48)]

    def generated(sample, heads, phase):
        with model.intervene(*([HeadAblation(heads, mode="zero", phase=phase)] if heads else [])):
            out = model.generate(sample, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)
        return tuple(out[0, len(sample) :].tolist())

    phases = ("prefill", "decode", "both")
    words = {(p, k): [generated(s, heads, p) for s in plain] for p in phases for k, heads in enumerate(sets)}
    settings = [("prefill", 0), ("decode", 1), ("both", 1)]
    chosen = [words[key][i] for i, key in enumerate(settings)]
    texts = [model.processor.tokenizer.decode(ids) for ids in chosen]
    samples = [
        model.prepare(e.question, images=e.images, system=e.system, answer=text)
        for e, text in zip(task.examples(3), texts, strict=True)
    ]
    assert [tuple(s.inputs["input_ids"][0, -2:].tolist()) for s in samples] == chosen
    seen = set()
    for phase in phases:
        curve = AblationCurve(scores, ks=[0, 48], phase=phase, rankings=["top"])
        found = curve.run(model, samples, batch_size=3, progress=False).per_sample["top"][0]
        expected = [[float(words[phase, k][i] == chosen[i]) for i in range(3)] for k in range(2)]
        np.testing.assert_array_equal(found, expected)
        seen.add(str(expected))
    assert len(seen) > 1  # the phases differ


def test_an_interrupted_run_resumes_where_it_stopped(samples, tmp_path):
    path, model, calls = tmp_path / "state.json", wrapped("qwen3_vl"), []
    curve = AblationCurve(SCORES, ks=[0, 2, 4], seeds=[0, 1])

    def run(stop=None, objective=None, curve=curve, of=None, checkpoint=path):
        def largest(logits):
            calls.append(len(logits))
            if len(calls) == stop:
                raise KeyboardInterrupt
            return logits[:, 0].amax(-1)

        return curve.run(
            model, of or samples("qwen3_vl"), objective=objective or largest, batch_size=2, checkpoint=checkpoint,
            save_every=3, progress=False,
        )  # fmt: skip

    whole = run(checkpoint=None)
    n_sets = 1 + 4 * 2  # the clean model is every curve's k = 0
    assert calls == [2] * n_sets + [1] * n_sets
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(stop=n_sets + 4)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    calls.clear()
    again = run()
    assert calls == [1] * (n_sets - 3)  # the first batch and three sets of the second were kept
    for name in whole.rankings:
        np.testing.assert_array_equal(again.per_sample[name], whole.per_sample[name])
    calls.clear()
    assert run().heads == whole.heads and calls == []
    with pytest.raises(CacheFileError, match="another run: it differs in samples. Use another file"):
        run(of=samples("qwen3_vl")[::-1])
    with pytest.raises(CacheFileError, match="differs in objective"):
        run(objective=AnswerLogProb())
    with pytest.raises(CacheFileError, match="differs in curve"):
        run(curve=AblationCurve(SCORES, ks=[0, 2, 4], seeds=[0, 1], phase="prefill"))
    path.write_text("{}")
    with pytest.raises(CacheFileError, match="expected a hooked_mllm.causal.checkpoint"):
        run()


def test_default_ks_end_with_the_ranking():
    assert AblationCurve(SCORES).ks == (0, 5, 10)
    assert AblationCurve(HeadScores(torch.rand(36, 32))).ks[-4:] == (100, 150, 200, 250)
    assert "ks=[0, 5, 10]" in repr(AblationCurve(SCORES))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ks": [5, 13]}, HeadError, "ranked heads from 0 to 12; got 13"),
        ({"ks": []}, InputError, "a k, a ranking and a seed"),
        ({"rankings": []}, InputError, "a k, a ranking and a seed"),
        ({"rankings": ["best"]}, HookValueError, "'top', 'bottom', 'random'; got 'best'"),
        ({"mode": "resample"}, HookValueError, "'zero', 'mean', 'uniform'"),
        ({"mode": "mean"}, HookValueError, "needs `reference=`"),
        ({"reference": torch.zeros(3, 4, 8)}, HookValueError, "no other mode takes one"),
        ({"phase": "later"}, HookValueError, "'prefill', 'decode', 'both'"),
    ],
)
def test_settings_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        AblationCurve(SCORES, **options)


def test_samples_of_batches_are_run_like_samples_by_themselves(samples):
    model, each = wrapped("internvl"), samples("internvl")
    curve = AblationCurve(SCORES, ks=[0, 2], rankings=["top"])
    options = {"objective": AnswerLogProb(), "progress": False, "batch_size": 2}
    expected = curve.run(model, each, **options)
    batches = SampleBatch.collate(each), [SampleBatch.collate(each[:2], "right"), each[2]], iter(each)
    for several in batches:
        found = curve.run(model, several, **options)
        np.testing.assert_array_equal(found.per_sample["top"], expected.per_sample["top"])
        assert found.provenance["sample_ids"] == ["s0", "s1", "s2"]


def test_runs_that_cannot_be(samples):
    model, curve = wrapped("qwen3_vl"), AblationCurve(SCORES, ks=[0, 2])
    bare = model.prepare(QUESTIONS[0], images=tiny_image())
    with pytest.raises(InputError, match="`samples` is empty"):
        curve.run(model, [])
    for mapping in (dict(bare.inputs), [dict(bare.inputs)]):
        with pytest.raises(InputError, match="Expected samples.*got dict"):
            curve.run(model, mapping)
    with pytest.raises(InputError, match="GreedyAccuracy reads the answer's tokens"):
        curve.run(model, bare, progress=False)
    with pytest.raises(InputError, match="phase='decode' ablates heads at the answer's positions"):
        AblationCurve(SCORES, ks=[2], phase="decode").run(model, bare, objective=KLDivergence(), progress=False)
    with pytest.raises(HeadError, match=r"model of \(2, 2\) \(layers, heads\); this one has \(3, 4\)"):
        AblationCurve(HeadScores(torch.rand(2, 2))).run(model, bare)
    with pytest.raises(InputError, match="batch_size must be 1 or more"):
        curve.run(model, bare, batch_size=0)
    with pytest.raises(NumericsError, match="not finite without L.H., L.H., for s1"):
        AblationCurve(SCORES, ks=[2], rankings=["top"]).run(
            model,
            samples("qwen3_vl")[:2],
            objective=lambda logits: torch.tensor([0.0, float("inf")]),
            progress=False,
        )

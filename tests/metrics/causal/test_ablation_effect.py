"""AblationEffect against bare torch hooks on the plain model."""

import pytest
import torch
from transformers import BatchFeature

from helpers.intervention_witness import batch, o_proj, sample
from helpers.tiny import FAMILIES, HEAD_DIM, HEADS, tiny_image
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm import HeadAblation, HookedMLLM, toys
from hooked_mllm.errors import CacheFileError, HookValueError, InputError
from hooked_mllm.metrics import AblationEffect
from hooked_mllm.metrics.causal.swept import Job
from hooked_mllm.objectives import AnswerLogProb, KLDivergence, LogitDifference

DIFFERENCE = LogitDifference(5, wrong=9)


def without(family, inputs, layer, head, rows=None):
    """Logits of the plain model with z of a head zero at some rows `[batch pos]`."""

    def silence(_, args):
        z = args[0].clone()
        keep = torch.zeros(z.shape[:2]) if rows is None else (~rows).float()
        z[..., head * HEAD_DIM : (head + 1) * HEAD_DIM] *= keep[..., None]
        return (z,)

    handle = o_proj(plain(family), layer).register_forward_pre_hook(silence)
    with torch.no_grad():
        logits = plain(family)(**inputs, use_cache=False).logits
    handle.remove()
    return logits


def effects(family, inputs, score, rows=None):
    with torch.no_grad():
        clean = score(plain(family)(**inputs, use_cache=False).logits)
    lost = [[clean - score(without(family, inputs, l, h, rows)) for h in range(HEADS)] for l in range(LAYERS)]
    return torch.stack([torch.stack(row) for row in lost]).double()  # [layer head sample]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_of_unequal_samples(family):
    inputs = batch(family)

    def score(logits):
        return logits[:, -1, 5] - logits[:, -1, 9]

    effect = AblationEffect(mode="zero", phase="both")
    got = effect.run(wrapped(family), inputs, objective=DIFFERENCE, per_sample=True, progress=False)
    expected = effects(family, inputs.inputs, score)
    assert torch.allclose(got.values, expected.permute(2, 0, 1), atol=1e-5)
    assert expected.abs().max() > 1e-3
    mean = effect.run(wrapped(family), list(inputs), objective=DIFFERENCE, progress=False)
    assert torch.allclose(mean.values, expected.mean(-1), atol=1e-5)
    assert mean.provenance["n_samples"] == 2 and mean.provenance["objective"]["objective"] == "LogitDifference"


@pytest.mark.parametrize("family", FAMILIES)
def test_model_inputs_as_a_processor_returns_them(family):
    """A mapping of several sequences has an effect for each; alone, in a list and in an iterator."""
    model, inputs = wrapped(family), batch(family)
    effect, options = AblationEffect(mode="zero", phase="both", layers=1), {"objective": DIFFERENCE, "progress": False}
    expected = effects(family, inputs.inputs, lambda logits: logits[:, -1, 5] - logits[:, -1, 9]).permute(2, 0, 1)[:, 1]
    feature = BatchFeature(dict(inputs.inputs))
    for samples in (feature, dict(feature), [feature], iter([feature])):
        got = effect.run(model, samples, per_sample=True, **options)
        assert torch.allclose(got.values[:, 1], expected, atol=1e-5) and got.provenance["n_samples"] == 2
    mixed = effect.run(model, [feature, inputs[0], inputs], per_sample=True, **options)
    assert torch.allclose(mixed.values[:, 1], expected[[0, 1, 0, 0, 1]], atol=1e-5)


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_phases_of_a_teacher_forced_answer(phase):
    family = "qwen3_vl"
    one = wrapped(family).prepare("What colour is it?", images=tiny_image(32, 24, seed=3), answer="the red dog")
    answer = one.layout.mask("answer")
    ids, start = one.inputs["input_ids"][0], int(answer.nonzero()[0])

    def score(logits):
        log_p = logits[0].double().log_softmax(-1)
        return torch.stack([log_p[i - 1, ids[i]] for i in answer.nonzero().flatten().tolist()]).sum()[None]

    rows = {"prefill": torch.arange(len(ids)) < start, "decode": answer, "both": torch.ones_like(answer)}[phase][None]
    got = AblationEffect(mode="zero", phase=phase).run(wrapped(family), one, objective=AnswerLogProb(), progress=False)
    assert torch.allclose(got.values, effects(family, one.inputs, score, rows)[..., 0], atol=1e-5)


def test_of_kl_more_is_worse_and_the_effect_positive():
    model, one = wrapped("internvl"), sample("internvl")
    got = AblationEffect(mode="zero", phase="prefill").run(model, one, objective=KLDivergence(), progress=False)
    with torch.no_grad():
        p = plain("internvl")(**one.inputs, use_cache=False).logits[:, -1].double().log_softmax(-1)
    expected = -effects(
        "internvl",
        one.inputs,
        lambda logits: (p.exp() * (p - logits[:, -1].double().log_softmax(-1))).sum(-1),
    )
    assert torch.allclose(got.values, expected[..., 0], atol=1e-6)
    assert got.values.min() > -1e-6


def test_mean_ablation_and_positions_are_those_of_head_ablation():
    model, one = wrapped("llava_onevision"), sample("llava_onevision")
    heads = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    mean = HeadAblation.reference(model, batch("llava_onevision"), heads)
    how = {"mode": "mean", "phase": "prefill", "positions": "question", "reference": mean}
    got = AblationEffect(**how).run(model, one, objective=DIFFERENCE, progress=False)
    with torch.no_grad():
        clean = model(one)[0, -1]
        for layer, head in heads:
            with model.intervene(HeadAblation([(layer, head)], **how)):
                lost = (clean - model(one)[0, -1])[[5, 9]]
            assert abs(got[layer, head] - float(lost[0] - lost[1])) < 1e-5
    assert got.provenance["config"]["reference"] == mean.describe()


def test_only_some_layers():
    model, one = wrapped("qwen3_vl"), sample("qwen3_vl")
    whole, part = (
        AblationEffect(mode="zero", phase="prefill", layers=layers).run(
            model, one, objective=DIFFERENCE, progress=False
        )
        for layers in (None, [-1, 0])
    )
    assert part.missing == (1,)
    assert torch.allclose(part.values[[0, 2]], whole.values[[0, 2]], atol=1e-6)


def test_interrupted_and_resumed(tmp_path, monkeypatch):
    model, samples, file = wrapped("qwen3_vl"), list(batch("qwen3_vl")), tmp_path / "state.json"
    effect = AblationEffect(mode="zero", phase="prefill")
    whole = effect.run(model, samples, objective=DIFFERENCE, progress=False)
    calls = []

    def stop_at_fourth(self, numbers, values, store=Job.store):
        calls.append(numbers)
        if len(calls) == 4:
            raise KeyboardInterrupt
        store(self, numbers, values)

    how = {"objective": DIFFERENCE, "checkpoint": file, "batch_size": 4, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr("hooked_mllm.metrics.causal.swept.Job.store", stop_at_fourth)
        with pytest.raises(KeyboardInterrupt):
            effect.run(model, samples, **how)
    assert model.list_hooks() == {}
    done = []

    def counted(self, numbers, values, store=Job.store):
        done.extend(numbers)
        store(self, numbers, values)

    monkeypatch.setattr("hooked_mllm.metrics.causal.swept.Job.store", counted)
    resumed = effect.run(model, samples, **how)
    assert torch.allclose(resumed.values, whole.values, atol=1e-6)
    assert len(done) == 2 * LAYERS * HEADS - sum(map(len, calls[:3]))
    with pytest.raises(CacheFileError, match="config"):
        AblationEffect(mode="zero", phase="both").run(model, samples, **how)
    with pytest.raises(CacheFileError, match="samples"):
        effect.run(model, samples[::-1], **how)


def test_the_planted_heads_of_a_toy_share_the_work():
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
    samples = toys.VisualRetrieval(pages=2).samples(model, 3, answer=True)
    scores = AblationEffect(mode="zero", phase="both").run(model, samples, objective=AnswerLogProb(), progress=False)
    assert set(scores.top(2)) <= {(2, head) for head in (4, 5, 6, 7)}


def test_bad_input():
    model, one = wrapped("qwen3_vl"), sample("qwen3_vl")
    with pytest.raises(HookValueError, match="reference"):
        AblationEffect(mode="mean", phase="both")
    with pytest.raises(HookValueError, match="mode"):
        AblationEffect(mode="remove", phase="both")
    with pytest.raises(HookValueError, match="positions"):
        AblationEffect(mode="zero", phase="decode", positions="question")
    with pytest.raises(InputError, match="There is no sample to run: `samples` is empty"):
        AblationEffect(mode="zero", phase="both").run(model, [], objective=DIFFERENCE)
    with pytest.raises(InputError, match="no answer"):
        AblationEffect(mode="zero", phase="decode").run(model, one, objective=DIFFERENCE, progress=False)
    with pytest.raises(InputError, match="answer="):
        AblationEffect(mode="zero", phase="both").run(model, one, objective=AnswerLogProb(), progress=False)

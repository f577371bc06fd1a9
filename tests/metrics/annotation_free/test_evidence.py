"""The model's own evidence: gradients and occlusions against plain transformers with bare torch hooks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.cache_witness import attentions, hooked, plain
from helpers.evidence_witness import prepared, reset
from hooked_mllm import Box, HookedMLLM, SampleBatch
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.metrics import GradientAgreement, OcclusionAgreement, RetrievalAttentionMass
from hooked_mllm.metrics.annotation_free import EvidenceAgreement
from hooked_mllm.metrics.annotation_free.gradient_agreement import log_odds
from hooked_mllm.toys import VisualRetrieval


def test_scores_are_the_weighted_rows(family):
    samples = [replace(prepared(family, n), id=f"s{n}") for n in range(2)]
    for agreement in (GradientAgreement(), GradientAgreement(queries="last", rule="gradient_x_input")):
        found = agreement.run(hooked(family), samples, progress=False)
        due = []
        for sample in samples:
            rows = torch.stack(attentions(family, sample.inputs))[:, 0].double()
            a = rows[:, :, sample.mask(agreement.queries)[0]].mean(2)
            due.append((a * agreement.weights(hooked(family), sample)).sum(-1).numpy())
        np.testing.assert_allclose(found.values, np.mean(due, axis=0), atol=1e-6)
        assert found.name == type(agreement).__name__ == found.provenance["metric"]
        assert found.provenance["config"] == agreement.config()
        assert found.provenance["sample_ids"] == ["s0", "s1"] and found.provenance["without_evidence"] == 0


def test_targets_are_the_heaviest_tokens(family):
    model, sample = hooked(family), prepared(family, target=Box(0, 0, 8, 8))
    agreement = GradientAgreement()
    count = int(sample.mask("visual").sum())
    (found,) = agreement.targets(model, sample, share=3 / count)
    weights = agreement.weights(model, sample)
    assert set(found.target_mask.nonzero()[:, 0].tolist()) == set(np.argsort(-weights.numpy())[:3].tolist())
    ram = model.measure(found, RetrievalAttentionMass(), progress=False)
    rows = torch.stack(attentions(family, sample.inputs))[:, 0]
    due = rows[:, :, sample.mask("question")[0]].mean(2)[..., found.target_mask].sum(-1)
    np.testing.assert_allclose(ram.values, due, atol=1e-5)


def test_the_model_is_left_as_it_was(family):
    model, sample = hooked(family), prepared(family)
    model.hf_model.requires_grad_(True)
    try:
        GradientAgreement(n_tokens=2).run(model, sample, progress=False)
        assert all(p.requires_grad and p.grad is None for p in model.hf_model.parameters())
    finally:
        model.hf_model.requires_grad_(False)
    OcclusionAgreement().run(model, sample, progress=False)
    assert not any(point.active for point in model.hook_dict.values())
    assert torch.equal(model(sample), plain_logits(family, sample))


def plain_logits(family, sample):
    reset(family)
    return plain(family, "sdpa")(**sample.inputs, use_cache=False).logits


class Fixed(EvidenceAgreement):
    """Evidence that is specified."""

    def __init__(self, *, values):
        super().__init__()
        self.values = values

    def relevance(self, model, sample):
        return torch.full((len(sample),), self.values[sample.id])


def test_samples_without_evidence_are_left_out_and_counted(family):
    model = hooked(family)
    samples = [replace(prepared(family, n), id=f"s{n}") for n in range(2)]
    found = Fixed(values={"s0": 0.0, "s1": 2.0}).run(model, samples, progress=False)
    alone = Fixed(values={"s1": 1.0}).run(model, samples[1], progress=False)
    assert torch.equal(found.values, alone.values)
    assert found.provenance["without_evidence"] == 1 and found.provenance["n_samples"] == 1
    with pytest.raises(InputError, match="no sample to measure"):
        Fixed(values={"s0": 0.0}).run(model, samples[:1], progress=False)
    with pytest.raises(NumericsError, match="relevance of .* is not finite"):
        Fixed(values={"s0": torch.nan}).run(model, samples[:1], progress=False)


def test_bad_input_is_rejected(family):
    model, sample = hooked(family), prepared(family)
    with pytest.raises(InputError, match="rule must be one of norm"):
        GradientAgreement(rule="sum")
    with pytest.raises(InputError, match="n_tokens must be 1"):
        OcclusionAgreement(n_tokens=0)
    for name in ("window", "refine", "batch_size"):
        with pytest.raises(InputError, match=f"{name} must be 1"):
            OcclusionAgreement(**{name: 0})
    with pytest.raises(InputError, match="share must be above 0"):
        next(GradientAgreement().targets(model, sample, share=0.0))
    with pytest.raises(InputError, match="without answer="):
        GradientAgreement().run(model, prepared(family, answer="red"), progress=False)
    with pytest.raises(InputError, match="Expected samples.*got dict"):
        GradientAgreement().run(model, sample.inputs, progress=False)


def test_samples_of_a_batch_are_scored_like_samples_by_themselves(family):
    model, samples = hooked(family), [prepared(family, 0), prepared(family, 1)]
    expected = GradientAgreement().run(model, samples, progress=False)
    found = GradientAgreement().run(model, SampleBatch.collate(samples), progress=False)
    assert torch.equal(found.values, expected.values) and found.provenance["n_samples"] == 2
    masks = [sample.target_mask for sample in GradientAgreement().targets(model, [SampleBatch.collate(samples)])]
    for mask, sample in zip(masks, GradientAgreement().targets(model, samples), strict=True):
        assert torch.equal(mask, sample.target_mask)


def test_log_odds_of_a_sure_model_keep_their_gradient():
    logits = torch.tensor([[60.0, 1.0, 0.0]], requires_grad=True)
    log_odds(logits, torch.tensor([0])).sum().backward()
    due = np.array([1.0, -1 / (1 + np.exp(-1)), -1 / (1 + np.e)])
    np.testing.assert_allclose(logits.grad[0].numpy(), due, rtol=1e-6)


def test_evidence_of_a_planted_toy_is_the_target():
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", check=False)
    samples = VisualRetrieval(seed=7, pages=1).samples(model, 4)
    gradient = GradientAgreement()
    assert sum(bool(s.target_mask[gradient.weights(model, s).argmax()]) for s in samples) >= 3  # by chance, 1 of 36
    assert set(gradient.run(model, samples, progress=False).top(4)) == {(2, 4), (2, 5), (2, 6), (2, 7)}
    occlusion = OcclusionAgreement(refine=1)
    assert sum(bool(s.target_mask[occlusion.weights(model, s).argmax()]) for s in samples) >= 3

"""The ids of samples in the provenance: all of a metric's, in order, however they were added."""

import pytest
import torch

from helpers.measured import FirstToken, four, run
from hooked_mllm import HeadSet
from hooked_mllm.errors import InputError
from hooked_mllm.metrics import KeyTokenCoverage, KeyTokenRatio, RetrievalAttentionMass, VisionMass

FAMILY = "qwen3_vl"


@pytest.fixture
def samples():
    return four(FAMILY)


@pytest.fixture
def ids(samples):
    names = [sample.id for sample in samples]
    assert len(set(names)) == 4 and None not in names
    return names


def test_a_metric_measured_twice_names_all_samples(samples, ids):
    metric = RetrievalAttentionMass().keep_samples()
    once = run(FAMILY, samples[:2], metric).provenance
    assert once["sample_ids"] == ids[:2] and once["n_samples"] == 2
    twice = run(FAMILY, samples[2:], metric).provenance
    assert twice["sample_ids"] == ids and twice["n_samples"] == 4 and twice["templates"] == once["templates"]
    assert metric.sample_scores().provenance["sample_ids"] == ids
    assert metric.sample_scores().mean([3, 0]).provenance["sample_ids"] == [ids[3], ids[0]]
    metric.reset()
    assert run(FAMILY, samples[1], metric).provenance["sample_ids"] == [ids[1]]


def test_every_kind_of_result_names_the_samples(samples, ids):
    ratio = KeyTokenRatio()
    coverage = KeyTokenCoverage(HeadSet(["L0H1"], n_layers=3, n_heads=4))
    scores, curve, own = run(FAMILY, samples, [ratio, coverage, FirstToken()])
    for result in (scores, curve, own, ratio.hit_rate(), ratio.compute()):
        assert result.provenance["sample_ids"] == ids


def test_states_that_are_merged_saved_and_loaded_keep_the_names(samples, ids):
    parts = [VisionMass().keep_samples(), VisionMass().keep_samples()]
    run(FAMILY, samples[:1], parts[0])
    run(FAMILY, samples[1:], parts[1])
    loaded = VisionMass().keep_samples()
    loaded.load_state_dict(parts[1].state_dict())
    assert loaded.compute().provenance["sample_ids"] == ids[1:]
    loaded.merge_state(parts[0])
    both = loaded.sample_scores()
    assert both.provenance["sample_ids"] == ids  # the merged rows come first, as their ids do
    for number, sample in enumerate(samples):
        torch.testing.assert_close(both.values[number], run(FAMILY, sample, VisionMass()).values)


def test_states_of_an_earlier_version_have_no_names(samples, ids):
    part = VisionMass()
    run(FAMILY, samples[:1], part)
    state = {name: value for name, value in part.state_dict().items() if name != "records"}
    loaded = VisionMass()
    loaded.load_state_dict(state)
    assert "sample_ids" not in loaded.compute().provenance
    loaded.merge_state(state)
    assert run(FAMILY, samples[1:], loaded).provenance["sample_ids"] == ids[1:]


def test_a_metric_twice_in_a_list_is_rejected(samples):
    metric = VisionMass()
    with pytest.raises(InputError, match="in the list twice"):
        run(FAMILY, samples, [metric, FirstToken(), metric])
    first, second = run(FAMILY, samples, [VisionMass(), VisionMass()])
    assert torch.equal(first.values, second.values) and first.counts.eq(4).all()

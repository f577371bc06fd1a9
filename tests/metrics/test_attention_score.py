"""The formula of attention scores in NumPy, and the score of chance."""

import json

import numpy as np
import pytest
import torch

from helpers.attention_reference import random_layers
from helpers.metric_witness import LENGTHS, SinkMass, each_metric, per_sample
from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import Box
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.heads import HeadScores
from hooked_mllm.metrics import AttentionScore, KeyTokenRatio, RetrievalAttentionMass, VisionMass
from hooked_mllm.metrics.base import Piece


@each_metric
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_over_samples_is_the_formula(make, reference, side):
    layers = random_layers(lengths=LENGTHS, padding_side=side, window=9)
    metric = make()
    metric.update(view=layers.view())
    scores = metric.compute()
    assert isinstance(scores, HeadScores) and scores.shape == (3, 4)
    np.testing.assert_allclose(scores.values.numpy(), reference(layers).mean(1), atol=3e-6)
    assert scores.counts.eq(4).all()
    if make is not SinkMass:  # whose first position is padding here
        assert 0 < scores.values.max() <= 1


@pytest.mark.parametrize("metric", [RetrievalAttentionMass, VisionMass], ids=lambda m: m.__name__)
def test_the_chance_level_is_stored_with_a_mass(metric):
    layers = random_layers(lengths=LENGTHS, window=9)
    flat = random_layers(lengths=LENGTHS, window=9, sharpness=0.0)  # q = 0: a head that attends evenly
    scores, even = per_sample(metric(), layers, 2).compute(), per_sample(metric(), flat, 2).compute()
    chance = scores.provenance["chance"]
    np.testing.assert_allclose(even.values, np.repeat(np.array(chance)[:, None], 4, axis=1), atol=1e-6)
    assert "chance" not in per_sample(KeyTokenRatio(), layers).compute().provenance


@pytest.mark.parametrize("reduce", ["sum", "argmax", "topk"])
@pytest.mark.parametrize(("select", "k"), [(3, 3), (0.25, 3), (np.float32(0.25), 3), (1.0, 12)])
def test_the_chance_of_a_vote_is_that_of_a_head_drawn_at_random(reduce, select, k):
    layers = random_layers(lengths=LENGTHS)
    scores = per_sample(AttentionScore(reduce=reduce, over_samples="frequency", select=select), layers).compute()
    assert scores.provenance["chance"] == [k / 12] * 3
    assert float(scores.values.mean()) == pytest.approx(k / 12)  # every sample has k votes for 12 heads


def test_votes_for_equal_heads_do_not_depend_on_rounding():
    """Two copies of each head in another order of summation: the copies tie, and the lower one has the votes."""
    layers = random_layers(lengths=LENGTHS)
    metric = AttentionScore(over_samples="frequency", select=2)
    exact = metric.score(layers.view())
    rng = np.random.default_rng(0)
    votes = []
    for noise in (0.0, 1e-6, 1e-5):
        tied = exact[:, :, [0, 0, 1, 1]] * torch.from_numpy(1 + noise * rng.uniform(-1, 1, (3, 4, 4)))
        (piece,) = metric._elect([Piece((0, 1, 2), {"total": tied})])
        votes.append(piece.parts["total"])
    assert torch.equal(votes[0], votes[1]) and torch.equal(votes[0], votes[2]) and votes[0].sum() == 8


@pytest.mark.parametrize("select", [0, -1, 1.5, 0.0, float("nan"), True, None])
def test_votes_that_select_nothing(select):
    with pytest.raises(InputError, match="select must be a positive number of heads or a share"):
        AttentionScore(over_samples="frequency", select=select)


@pytest.mark.parametrize("reduce", ["sum", "argmax", "topk"])
def test_tokens_come_in_every_form_of_positions(reduce):
    model = wrapped("qwen3_vl")
    sample = model.prepare("Where is it?", images=tiny_image(), target=Box(0, 0, 9, 9))
    question, target = sample.layout.question, sample.mask("target")[0]
    expected = model.measure(sample, AttentionScore(reduce=reduce), progress=False).values
    for queries in (question, question[None], question.numpy(), question.nonzero()[:, 0].tolist()):
        for keys in (Box(0, 0, 9, 9), [Box(0, 0, 9, 9)], target, target.tolist()):
            metric = AttentionScore(queries=queries, keys=keys, reduce=reduce)
            assert torch.equal(model.measure(sample, metric, progress=False).values, expected)
            assert json.loads(json.dumps(metric.config())) == metric.config()
    last = model.measure(sample, AttentionScore(queries="last", reduce=reduce), progress=False).values
    assert torch.equal(model.measure(sample, AttentionScore(queries=-1, reduce=reduce), progress=False).values, last)


def test_tokens_that_are_no_positions():
    for tokens, error in ((slice(0, 3), InputError), (torch.tensor([0.5]), LayoutError)):
        with pytest.raises(error):
            AttentionScore(keys=tokens)
    one, other = torch.tensor([True, False]), torch.tensor([False, True])
    with pytest.raises(ValueError, match="same settings"):
        AttentionScore(keys=one).merge_state(AttentionScore(keys=other))

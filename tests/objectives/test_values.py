"""Values of objectives against NumPy in float64 on the logits of plain transformers."""

import numpy as np
import pytest
import torch

from helpers.objective_witness import answer_ids, close, log_softmax, sample_logits
from helpers.wrapped import wrapped
from hooked_mllm import SampleBatch
from hooked_mllm.errors import NumericsError
from hooked_mllm.objectives import AnswerLogProb, LogitDifference, objective_values


@torch.no_grad()
def test_a_list_of_wrong_tokens_is_averaged_without_the_correct_one(family, samples_of):
    sample = samples_of(family)[0]
    logits = sample_logits(family, sample)[-len(answer_ids(sample)) - 1]
    correct = answer_ids(sample)[0]
    got = objective_values(wrapped(family), sample, LogitDifference(wrong=[7, correct, 300, 7]))
    close(got, [logits[correct] - (logits[7] + logits[300]) / 2])
    got = objective_values(wrapped(family), sample, LogitDifference([5, 9], 300))
    close(got, [(logits[5] + logits[9]) / 2 - logits[300]])
    close(objective_values(wrapped(family), sample, AnswerLogProb(300)), [log_softmax(logits)[300]])
    both = np.logaddexp(log_softmax(logits)[7], log_softmax(logits)[300])
    close(objective_values(wrapped(family), sample, AnswerLogProb([7, 300])), [both])


@torch.no_grad()
def test_every_form_of_inputs_and_objective_has_the_same_value(toy, samples):
    objective = AnswerLogProb()
    expected = objective_values(toy, samples, objective)
    resolved = toy.resolve(samples)
    assert expected.shape == (4,) and torch.equal(objective_values(toy, resolved, objective), expected)
    assert torch.equal(objective_values(toy, samples, objective.bind(toy, resolved)), expected)
    by_function = objective_values(toy, samples, lambda logits: logits[:, 0].max(-1).values)
    assert torch.equal(by_function, toy(samples)[samples.mask("last")].max(-1).values)


@torch.no_grad()
def test_a_corrupted_counterpart_is_resolved_like_the_inputs(toy, samples):
    others = SampleBatch.collate([samples[2], samples[3], samples[0], samples[1]], "left")  # with other answers
    got = objective_values(toy, samples, LogitDifference(), others)
    assert torch.equal(got, objective_values(toy, samples, LogitDifference(), toy.resolve(others)))
    vocabulary, logits = toy.processor.tokenizer.get_vocab(), toy(samples)[samples.mask("last")]
    pairs = [[vocabulary[s.answer] for s in pair] for pair in zip(samples, others, strict=True)]
    expected = torch.stack([row[own] - row[other] for row, (own, other) in zip(logits, pairs, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_values_that_are_not_a_number(toy, samples):
    with pytest.raises(NumericsError, match="not a number"):
        objective_values(toy, samples, lambda logits: logits[:, 0, 0] * torch.nan)

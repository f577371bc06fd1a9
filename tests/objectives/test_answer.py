"""Objectives of the answer against NumPy in float64, in batches padded on either side."""

from dataclasses import replace

import pytest
import torch

from helpers.objective_witness import TASK, answer_ids, answer_log_probs, close, sample_logits
from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import SampleBatch
from hooked_mllm.errors import InputError
from hooked_mllm.objectives import (
    AnswerLogProb,
    GreedyAccuracy,
    LogitDifference,
    objective_values,
)

SIDES = ("left", "right")


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_answers_of_unequal_length_in_a_padded_batch(family, samples_of, side):
    samples = samples_of(family)
    lengths = [len(answer_ids(s)) for s in samples]
    assert len(set(lengths)) > 1
    batch = SampleBatch.collate(samples, side)
    got = objective_values(wrapped(family), batch, AnswerLogProb())
    close(got, [answer_log_probs(family, s).sum() for s in samples])
    bound = AnswerLogProb().bind(wrapped(family), wrapped(family).resolve(batch))
    assert (bound.positions >= 0).sum(1).tolist() == lengths


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_greedy_accuracy_is_whether_every_token_is_the_most_likely(family, samples_of, side):
    model, sample = wrapped(family), samples_of(family)[1]
    n = len(answer_ids(sample))
    greedy = {k: v.clone() for k, v in sample.inputs.items()}
    for position in range(len(sample) - n, len(sample)):  # the answer becomes the model's own
        most_likely = sample_logits(family, replace(sample, inputs=greedy))[position - 1].argmax()
        greedy["input_ids"][0, position] = int(most_likely)
    changed = {k: v.clone() for k, v in greedy.items()}
    changed["input_ids"][0, -1] ^= 1
    samples = [samples_of(family)[0], *(replace(sample, inputs=inputs) for inputs in (greedy, changed))]
    expected = []
    for s in samples:
        logits = sample_logits(family, s)[-len(answer_ids(s)) - 1 : -1]
        expected.append(float((logits.argmax(-1) == answer_ids(s)).all()))
    assert expected == [0, 1, 0]
    assert objective_values(model, SampleBatch.collate(samples, side), GreedyAccuracy()).tolist() == expected


def test_objectives_of_the_answer_need_one(toy, samples):
    prompt = TASK.samples(toy, 1)[0]
    for objective in (AnswerLogProb(), GreedyAccuracy(), LogitDifference(wrong="red")):
        with pytest.raises(InputError, match=r"sample 'visual-retrieval/.*' has none: pass `answer=` to prepare"):
            objective.bind(toy, toy.resolve(prompt))
        with pytest.raises(InputError, match="plain mapping.*make samples with"):
            objective.bind(toy, toy.resolve(samples.inputs))
    with pytest.raises(InputError, match=r"of the corrupted sample, reads the answer's tokens, and sample"):
        LogitDifference("red").bind(toy, toy.resolve(samples[0]), toy.resolve(prompt))
    unknown = toy.prepare("what color is the star ?", images=tiny_image(96, 96), answer="red zebra")
    for objective in (AnswerLogProb(), GreedyAccuracy(), LogitDifference(wrong="red")):
        with pytest.raises(InputError, match="'red zebra' is not in the vocabulary: the tokenizer reads token 1"):
            objective.bind(toy, toy.resolve(unknown))

"""Objectives against NumPy in float64 on the logits of plain transformers, in batches padded on either side."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.objective_witness import answer_ids, answer_log_probs, log_softmax, sample_logits
from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import SampleBatch, objectives
from hooked_mllm.objectives import AnswerLogProb, GreedyAccuracy, KLDivergence, LogitDifference, objective_values

QUESTIONS = ("What colour is the mug?", "Where is the dog in the picture of the star?", "What is red?")
ANSWERS = ("red", "the answer is blue", "yellow star")
SIDES = ("left", "right")


@pytest.fixture(scope="module")
def samples_of():
    made = {}

    def make(family):
        if family not in made:
            made[family] = [
                wrapped(family).prepare(q, images=tiny_image(32, 24, seed), answer=a, id=f"s{seed}")
                for seed, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
            ]
        return made[family]

    return make


def close(got, want, tolerance=2e-4):
    np.testing.assert_allclose(got.detach().cpu().double().numpy(), want, rtol=0, atol=tolerance)


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
def test_logit_difference_reads_the_last_position_of_the_prompt(family, samples_of, side):
    samples = samples_of(family)
    others = [samples[1], samples[2], samples[0]]
    got = objective_values(
        wrapped(family), SampleBatch.collate(samples, side), LogitDifference(), SampleBatch.collate(others, side)
    )
    want = []
    for clean, other in zip(samples, others, strict=True):
        row = sample_logits(family, clean)[-len(answer_ids(clean)) - 1]
        want.append(row[answer_ids(clean)[0]] - row[answer_ids(other)[0]])
    close(got, want)


@torch.no_grad()
def test_of_a_list_of_wrong_tokens_the_mean_counts_without_the_correct_one(family, samples_of):
    sample = samples_of(family)[0]
    row = sample_logits(family, sample)[-len(answer_ids(sample)) - 1]
    right = answer_ids(sample)[0]
    got = objective_values(wrapped(family), sample, LogitDifference(wrong=[7, right, 300, 7]))
    close(got, [row[right] - (row[7] + row[300]) / 2])
    close(objective_values(wrapped(family), sample, LogitDifference([5, 9], 300)), [(row[5] + row[9]) / 2 - row[300]])
    close(objective_values(wrapped(family), sample, AnswerLogProb(300)), [log_softmax(row)[300]])
    both = np.logaddexp(log_softmax(row)[7], log_softmax(row)[300])
    close(objective_values(wrapped(family), sample, AnswerLogProb([7, 300])), [both])


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_greedy_accuracy_is_whether_every_token_is_the_likeliest(family, samples_of, side):
    model, asked = wrapped(family), samples_of(family)[1]
    n = len(answer_ids(asked))
    answered = {k: v.clone() for k, v in asked.inputs.items()}
    for place in range(len(asked) - n, len(asked)):  # its answer becomes what it would say
        likely = sample_logits(family, replace(asked, inputs=answered))[place - 1].argmax()
        answered["input_ids"][0, place] = int(likely)
    spoilt = {k: v.clone() for k, v in answered.items()}
    spoilt["input_ids"][0, -1] ^= 1
    samples = [samples_of(family)[0], *(replace(asked, inputs=i) for i in (answered, spoilt))]
    want = []
    for s in samples:
        rows = sample_logits(family, s)[-len(answer_ids(s)) - 1 : -1]
        want.append(float((rows.argmax(-1) == answer_ids(s)).all()))
    assert want == [0, 1, 0]
    assert objective_values(model, SampleBatch.collate(samples, side), GreedyAccuracy()).tolist() == want


@torch.no_grad()
@pytest.mark.parametrize("where", ["last", "generating", "question"])
def test_kl_is_that_of_the_clean_run_against_this_one(family, samples_of, where):
    model, (clean, other, _) = wrapped(family), samples_of(family)
    batch = SampleBatch.collate([clean, other], "left")
    bound = KLDivergence(where).bind(model, model.resolve(batch))
    bound = bound.with_clean(objectives.logits_at(model, batch, bound.positions))
    close(objective_values(model, batch, bound), [0, 0], 1e-6)
    edit = ("blocks.1.hook_resid_post", lambda x, hook: 0.5 * x)
    with model.hooks([edit]):
        got = objective_values(model, batch, bound)
        edited = model(batch).double().numpy()
    plainly = model(batch).double().numpy()
    at = batch.mask(where).numpy()
    want = []
    for i in range(2):
        p, q = log_softmax(plainly[i][at[i]]), log_softmax(edited[i][at[i]])
        want.append((np.exp(p) * (p - q)).sum(-1).mean())
    assert min(want) > 0.01
    close(got, want)


@torch.no_grad()
def test_a_function_is_given_the_rows_it_asks_for(family, samples_of):
    sample = samples_of(family)[1]
    rows = sample_logits(family, sample)
    got = objective_values(wrapped(family), sample, lambda logits: logits[:, 0, 11])
    close(got, [rows[-len(answer_ids(sample)) - 1, 11]])
    every = objectives.FunctionObjective(lambda logits: logits[..., 11].sum(1), positions="generating")
    close(objective_values(wrapped(family), sample, every), [rows[-len(answer_ids(sample)) - 1 : -1, 11].sum()])

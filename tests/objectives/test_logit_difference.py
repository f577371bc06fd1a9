"""Logit differences against NumPy in float64, and wrong tokens that are correct or missing."""

import pytest
import torch

from helpers.objective_witness import answer_ids, close, sample_logits
from helpers.wrapped import wrapped
from hooked_mllm import SampleBatch
from hooked_mllm.errors import InputError
from hooked_mllm.objectives import LogitDifference, objective_values

SIDES = ("left", "right")


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
def test_logit_difference_reads_the_last_position_of_the_prompt(family, samples_of, side):
    samples = samples_of(family)
    others = [samples[1], samples[2], samples[0]]
    got = objective_values(
        wrapped(family), SampleBatch.collate(samples, side), LogitDifference(), SampleBatch.collate(others, side)
    )
    expected = []
    for clean, other in zip(samples, others, strict=True):
        logits = sample_logits(family, clean)[-len(answer_ids(clean)) - 1]
        expected.append(logits[answer_ids(clean)[0]] - logits[answer_ids(other)[0]])
    close(got, expected)


def test_a_wrong_token_must_differ_from_the_correct_one(toy, samples):
    inputs = toy.resolve(samples)
    with pytest.raises(
        InputError,
        match=r"left for sample 0.*\[\d+\] are all correct ones. Specify others as `wrong=`",
    ):
        LogitDifference("red", ["red"]).bind(toy, inputs)
    with pytest.raises(InputError, match=r"left for sample 0.*the corrupted sample must have another answer"):
        LogitDifference().bind(toy, inputs, inputs)
    with pytest.raises(InputError, match=r"has no wrong token: specify `wrong=`.*corrupted sample"):
        LogitDifference().bind(toy, inputs)
    with pytest.raises(InputError, match=r"Expected 4 corrupted samples, one for each; got 1"):
        LogitDifference().bind(toy, inputs, toy.resolve(samples[0]))

"""A user's own function as an objective."""

import pytest
import torch

from helpers.objective_witness import answer_ids, close, sample_logits
from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import objectives
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.objectives import (
    BoundObjective,
    FunctionObjective,
    LogitDifference,
    as_objective,
    objective_values,
)


@torch.no_grad()
def test_a_function_takes_the_logits_at_its_positions(family, samples_of):
    sample = samples_of(family)[1]
    logits = sample_logits(family, sample)
    got = objective_values(wrapped(family), sample, lambda x: x[:, 0, 11])
    close(got, [logits[-len(answer_ids(sample)) - 1, 11]])
    every = objectives.FunctionObjective(lambda x: x[..., 11].sum(1), positions="generating")
    close(objective_values(wrapped(family), sample, every), [logits[-len(answer_ids(sample)) - 1 : -1, 11].sum()])


def test_a_plain_function_is_an_objective_and_other_values_raise(toy, samples):
    def mean_logit(logits):
        return logits[:, 0].mean(-1)

    objective = as_objective(mean_logit)
    assert isinstance(objective, FunctionObjective) and objective.larger_is_better
    assert as_objective(objective) is objective
    assert objective.describe() == {"objective": "FunctionObjective", "function": "mean_logit", "positions": "last"}
    loss = FunctionObjective(mean_logit, larger_is_better=False)
    assert not loss.larger_is_better and loss.describe() == {**objective.describe(), "larger_is_better": False}
    with pytest.raises(InputError, match=r"got the class LogitDifference. Create one: LogitDifference\(\)"):
        as_objective(LogitDifference)
    bound = objective.bind(toy, toy.resolve(samples))
    assert isinstance(bound, BoundObjective) and "mean_logit" in repr(bound)
    for wrong in ("red", None, 5, int, bound):
        with pytest.raises(InputError, match=r"such as LogitDifference\(\)"):
            as_objective(wrong)
    for fn, got in ((lambda x: x, r"\(4, 1, \d+\)"), (lambda x: 1.0, "float"), (lambda x: x.mean(), r"\(\)")):
        with pytest.raises(InputError, match=rf"one number for each sample, a tensor \(4,\); got {got}"):
            objective_values(toy, samples, fn)
    with pytest.raises(InputError, match=r"Expected a function of logits \[batch n d_vocab\]; got int"):
        FunctionObjective(int)


def test_a_function_takes_the_same_number_of_positions_of_every_sample():
    model = wrapped("qwen3_vl")
    batch = model.prepare(["What is red?"] * 2, [tiny_image(), tiny_image()], answer=["red", "the answer is blue"])
    with pytest.raises(LayoutError, match=r"'generating' are \[\d, \d\] of these samples. Run each sample alone"):
        objective_values(model, batch, FunctionObjective(lambda x: x[:, 0, 0], "generating"))

"""The interface of every objective: a description in JSON, its direction, and checks of the logits."""

import json

import numpy as np
import pytest
import torch

from hooked_mllm.errors import InputError
from hooked_mllm.objectives import (
    AnswerLogProb,
    BoundObjective,
    FunctionObjective,
    GreedyAccuracy,
    KLDivergence,
    LogitDifference,
    Objective,
)


def test_descriptions_are_json_and_complete():
    descriptions = [
        objective.describe()
        for objective in (
            LogitDifference(),
            LogitDifference(5, ["red", np.int64(7)]),
            LogitDifference(torch.tensor(5), len),
            AnswerLogProb(),
            AnswerLogProb("red"),
            GreedyAccuracy(),
            KLDivergence("generating"),
            KLDivergence(slice(0, 4)),
            FunctionObjective(len, torch.tensor([1, 2])),
        )
    ]
    assert json.loads(json.dumps(descriptions)) == descriptions
    assert len({json.dumps(description) for description in descriptions}) == len(descriptions)
    assert descriptions[1] == {"objective": "LogitDifference", "correct": 5, "wrong": ["red", 7]}
    assert descriptions[2]["wrong"] == "function len"
    assert repr(AnswerLogProb("red")) == "AnswerLogProb(answer='red')"
    flags = {type(o): (o.larger_is_better, o.needs_clean, o.differentiable) for o in (GreedyAccuracy(), KLDivergence())}
    assert flags == {GreedyAccuracy: (True, False, False), KLDivergence: (False, True, True)}
    with pytest.raises(TypeError, match="abstract"):
        Objective()


class Sum(Objective):
    """The sum of the logits that are read."""

    def bind(self, model, inputs, corrupted=None):
        return BoundObjective(self, torch.tensor([[2], [0]]), lambda logits, clean: logits.sum((1, 2)))

    def describe(self):
        return {"objective": "Sum", "answer": None, "weight": 2}


class Difference(Sum):
    """The sum minus that of the clean run."""

    needs_clean = True

    def bind(self, model, inputs, corrupted=None):
        score = lambda logits, clean: (logits - clean).sum((1, 2))  # noqa: E731
        return BoundObjective(self, torch.tensor([[2], [0]]), score)


def test_a_bound_objective_is_a_function_of_the_logits_at_its_positions():
    bound = Sum().bind(None, None)
    logits = torch.arange(10.0).view(2, 1, 5)
    assert bound(logits).tolist() == [10.0, 35.0]
    assert repr(bound) == "BoundObjective(Sum(weight=2), positions=[[2], [0]])"
    with pytest.raises(InputError, match=r"positions \(2, 1\); got \(2, 3, 5\)"):
        bound(torch.zeros(2, 3, 5))


def test_the_clean_run_is_kept_without_its_graph():
    bound = Difference().bind(None, None)
    logits = torch.arange(10.0).view(2, 1, 5).requires_grad_()
    with pytest.raises(InputError, match=r"compares with a clean run.*with_clean"):
        bound(logits)
    with_clean = bound.with_clean(logits * 2)
    assert bound.clean is None and not with_clean.clean.requires_grad
    with_clean(logits).sum().backward()
    assert logits.grad.tolist() == torch.ones(2, 1, 5).tolist()

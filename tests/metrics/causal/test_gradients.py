"""Products of gradients and changes, against small steps along the change, and runs between two inputs."""

import numpy as np
import pytest
import torch

from helpers.intervention_witness import sample
from helpers.wrapped import noise, wrapped
from hooked_mllm.errors import HookValueError, NumericsError
from hooked_mllm.metrics.causal.gradients import Products, activations, between, entrances
from hooked_mllm.objectives import FunctionObjective, LogitDifference

POINTS = ("blocks.0.attn.hook_z", "blocks.1.hook_resid_post")


@pytest.fixture
def bound(family):
    """Model, inputs, and an objective bound to them."""
    model = wrapped(family)
    inputs = model.resolve(sample(family, 0, 0))
    return model, inputs, LogitDifference(5, wrong=9).bind(model, inputs)


def logits_of(model, inputs, bound):
    return activations(model, inputs, [], bound.positions)[1]


@torch.no_grad()
def test_activations_are_those_of_a_cache(bound, family):
    model, inputs, objective = bound
    kept, logits = activations(model, inputs, POINTS, objective.positions)
    whole, cache = model.run_with_cache(sample(family, 0, 0), names_filter=list(POINTS))
    assert all(torch.equal(kept[name], cache[name]) for name in POINTS)
    torch.testing.assert_close(logits[:, 0], whole[:, int(objective.positions[0, 0])])


@pytest.mark.parametrize("name", POINTS)
def test_products_are_slopes_along_the_change(bound, name):
    model, inputs, objective = bound
    own, _ = activations(model, inputs, [name], objective.positions)
    change = {name: noise(own[name])}
    rows = torch.ones(own[name].shape[:2], dtype=torch.bool)
    products = Products(model, [name], inputs, rows)
    logits = products.add(objective, change=change)
    torch.testing.assert_close(logits, logits_of(model, inputs, objective))
    assert products.sums[name].dtype == torch.float64 and products.sums[name].shape == own[name].shape[:-1]

    def value(step):
        edit = (name, lambda x, hook: x + step * change[name])
        with torch.no_grad(), model.hooks([edit]):
            return float(objective(logits_of(model, inputs, objective)).sum())

    step = 1e-2
    slope = (value(step) - value(-step)) / (2 * step)
    np.testing.assert_allclose(float(products.sums[name].sum()), slope, rtol=2e-2, atol=1e-3)


def test_products_with_activations_of_another_run_are_those_with_the_difference(bound):
    model, inputs, objective = bound
    own, _ = activations(model, inputs, POINTS, objective.positions)
    to = {name: x + noise(x, seed=1) for name, x in own.items()}
    rows = torch.ones(1, own[POINTS[1]].shape[1], dtype=torch.bool)
    by_target, by_change = (Products(model, POINTS, inputs, rows) for _ in range(2))
    by_target.add(objective, to=to)
    by_change.add(objective, change={name: to[name] - x for name, x in own.items()})
    for name in POINTS:
        torch.testing.assert_close(by_target.sums[name], by_change.sums[name], rtol=1e-4, atol=1e-5)


def test_positions_that_do_not_count_have_no_products(bound):
    model, inputs, objective = bound
    own, _ = activations(model, inputs, POINTS, objective.positions)
    rows = torch.zeros(1, own[POINTS[1]].shape[1], dtype=torch.bool)
    rows[0, -2:] = True
    products = Products(model, POINTS, inputs, rows)
    products.add(objective, change=own)
    once = {name: x.clone() for name, x in products.sums.items()}
    assert all((x[:, :-2] == 0).all() and (x[:, -2:] != 0).any() for x in once.values())
    products.add(objective, change=own)
    for name, x in once.items():
        torch.testing.assert_close(products.sums[name], 2 * x)


@torch.no_grad()
def test_runs_between_two_inputs_begin_and_end_at_them(family):
    model = wrapped(family)
    clean, other = (model.resolve(sample(family, number, 0)) for number in (0, 1))
    objective = LogitDifference(5, wrong=9).bind(model, clean)
    names = entrances(model)
    start, end = (activations(model, inputs, names, objective.positions)[0] for inputs in (clean, other))
    assert names[0] == "hook_embed" and len(names) == (3 if family == "qwen3_vl" else 1)
    change = {name: end[name] - start[name] for name in start}
    for share, inputs in ((0.0, clean), (1.0, other)):
        with between(model, start, change, share):
            got = logits_of(model, clean, objective)
        torch.testing.assert_close(got, logits_of(model, inputs, objective), atol=1e-4, rtol=1e-4)
    with between(model, start, change, 0.5):
        middle = activations(model, clean, ["blocks.0.hook_resid_pre"], objective.positions)[0]
    expected = (start["hook_embed"] + end["hook_embed"]) / 2
    torch.testing.assert_close(middle["blocks.0.hook_resid_pre"], expected)
    assert model.list_hooks() == {}


def test_an_objective_without_a_gradient(bound, family):
    model, inputs, _ = bound
    constant = FunctionObjective(lambda logits: logits[:, 0, 0].detach()).bind(model, inputs)
    rows = torch.ones(1, len(sample(family, 0, 0)), dtype=torch.bool)
    with pytest.raises(HookValueError, match="has no gradient"):
        Products(model, POINTS, inputs, rows).add(constant, change={})
    assert model.list_hooks() == {}


def test_gradients_that_are_not_finite(bound, family):
    model, inputs, _ = bound
    endless = FunctionObjective(lambda logits: logits[:, 0, 0] * torch.inf).bind(model, inputs)
    own, _ = activations(model, inputs, POINTS, endless.positions)
    rows = torch.ones(1, len(sample(family, 0, 0)), dtype=torch.bool)
    with pytest.raises(NumericsError, match="is not finite.*dtype='bfloat16'"):
        Products(model, POINTS, inputs, rows).add(endless, change=own)
    assert model.list_hooks() == {}

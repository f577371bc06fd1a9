"""Calls with tensors, arrays, sets and iterators in the place of numbers and sequences, and paths in that of names."""

import numpy as np
import pytest
import torch

from helpers.fresh import modules_after
from hooked_mllm import Box, HeadAblation, HeadSet, HookedMLLM, Mask, metrics, toys
from hooked_mllm.inputs.sample import SampleBatch


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained(toys.path("toy-qwen3-vl"), dtype="float32")  # a pathlib.Path


@pytest.fixture(scope="module")
def samples(model):
    return toys.VisualRetrieval(pages=1).samples(model, 2, answer=True)


@pytest.fixture(scope="module")
def scores(model, samples):
    return model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)


@pytest.mark.parametrize("form", [iter, tuple, SampleBatch.collate, lambda samples: (sample for sample in samples)])
def test_batches_of_iterables(samples, form):
    assert SampleBatch.collate(form(samples)).samples == tuple(samples)


def test_curves_of_arrays_sets_and_iterators(scores):
    curve = metrics.AblationCurve(scores, ks=np.array([1, 2]), seeds=np.arange(2))
    assert curve.ks == (1, 2) and curve.seeds == (0, 1)
    curve = metrics.AblationCurve(scores, ks={1, 2}, rankings=iter(["top"]), seeds=torch.arange(2).tolist())
    assert curve.ks == (1, 2) and curve.rankings == ("top",)


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor])
def test_masks_of_lists_and_tensors(form):
    mask = Mask(form([[True, False], [False, True]]))
    assert isinstance(mask.pixels, np.ndarray) and mask.pixels.tolist() == [[True, False], [False, True]]


def test_boxes_of_tensors_and_arrays():
    for values in (torch.tensor([1.0, 2.0, 3.0, 4.0]), np.array([1, 2, 3, 4]), np.array([1, 2, 3, 4], np.float32)):
        assert Box(*values) == Box(1, 2, 3, 4) and Box(*values, image=torch.tensor(0)).image == 0


def test_names_of_samples_that_are_numbers(model):
    assert model.prepare("What is red?", id=7).id == 7
    assert [sample.id for sample in model.prepare(["a", "b"], id=[1, 2]).samples] == [1, 2]


def test_measuring_an_array_of_samples(model, samples, scores):
    array = np.empty(len(samples), dtype=object)
    array[:] = samples
    again = model.measure(array, metrics.RetrievalAttentionMass(), progress=False)
    torch.testing.assert_close(again.values, scores.values)


@pytest.mark.parametrize("wrong", [[6], (6,), np.array([6]), torch.tensor([6]), 6, range(6, 7)])
def test_wrong_tokens(model, samples, wrong):
    attributed = metrics.DirectLogitAttribution(correct=5, wrong=wrong).run(model, samples[:1], progress=False)
    expected = metrics.DirectLogitAttribution(correct=5, wrong=[6]).run(model, samples[:1], progress=False)
    torch.testing.assert_close(attributed.values, expected.values)


@pytest.mark.parametrize("factor", [np.float32(2), 2])
def test_factors(factor):
    assert HeadAblation("L2H4", mode="scale", phase="both", factor=factor).factor == 2


def test_values_that_are_converted():
    """In a process of its own, without the strict checks of the tests."""
    code = """
import numpy as np, torch
from hooked_mllm import HeadAblation, metrics, objectives
for factor in (torch.tensor(2.0), np.array(2.0)):
    assert HeadAblation("L2H4", mode="scale", phase="both", factor=factor).factor == 2.0
assert metrics.DirectLogitAttribution(wrong={6}).config() == metrics.DirectLogitAttribution(wrong=[6]).config()
assert objectives.LogitDifference({5}, (6,)).describe() == objectives.LogitDifference([5], [6]).describe()
"""
    assert "hooked_mllm.objectives.logit_difference" in modules_after(code)


def test_wrong_calls_keep_their_advice():
    code = """
from hooked_mllm import HookedMLLM, InputError, LayoutError, SampleBatch, toys
model = HookedMLLM.from_pretrained("toy-qwen3-vl")
_, cache = model.run_with_cache(model.prepare("What is red?"))
for call, kind, advice in (
    (lambda: model(3), InputError, "got int. `model.prepare(question, images=...)` makes a sample"),
    (lambda: cache.pattern(2, queries={1, 2}), LayoutError, "expected the name of a token kind such as 'question'"),
    (lambda: model.measure(model.prepare("a"), 3), InputError, "Expected a metric or several"),
    (lambda: SampleBatch.collate(3), InputError, "collate: expected samples as Iterable[Sample]; got 3"),
):
    try:
        call()
    except kind as error:
        assert advice in str(error), error
    else:
        raise AssertionError(advice)
"""
    assert "hooked_mllm.model.hooked_mllm" in modules_after(code)


def test_usual_constructors_need_no_call_of_beartype(monkeypatch):
    HeadSet([(2, 4)], n_layers=4, n_heads=8), Box(1, 2, 3, 4)  # the first call makes the check

    def fail(*_):
        raise AssertionError("a check of every argument")

    monkeypatch.setattr("hooked_mllm.checks.arguments._check_size", fail)
    assert HeadSet([(2, 4)], n_layers=4, n_heads=8) and Box(1, 2, 3, 4.5)
    with pytest.raises(AssertionError, match="a check of every argument"):
        Box("1", 2, 3, 4)

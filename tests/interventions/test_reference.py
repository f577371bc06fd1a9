"""References of heads over samples, and those that do not serve."""

from dataclasses import replace

import pytest
import torch
from transformers import BatchFeature

from helpers.ablation_witness import CHOSEN, ablate
from helpers.intervention_witness import batch, sample, z_replaced
from helpers.wrapped import wrapped
from hooked_mllm import HeadAblation
from hooked_mllm.errors import HeadError, HookValueError, InputError
from hooked_mllm.heads import HeadSet
from hooked_mllm.interventions.reference import HeadReference


@torch.no_grad()
def test_a_reference_of_what_a_processor_returns(family):
    model, inputs = wrapped(family), batch(family, seed=3)
    expected = HeadAblation.reference(model, inputs, CHOSEN).mean
    feature = BatchFeature(dict(inputs.inputs))
    for samples in (feature, [feature], iter([inputs])):
        reference = HeadAblation.reference(model, samples, CHOSEN)
        assert reference.n_samples == 2 and torch.equal(reference.mean.nan_to_num(), expected.nan_to_num())


@torch.no_grad()
def test_a_reference_of_some_positions(family):
    s, kept = sample(family), []
    with z_replaced(family, lambda z, l: kept.append(z), layers=[1]) as witness:
        witness(**s.inputs)
    reference = HeadAblation.reference(wrapped(family), s, [(1, 2)], positions="target")
    torch.testing.assert_close(reference.mean[1, 2], kept[0][s.mask("target")].mean(0)[2])
    assert reference.n_tokens == int(s.mask("target").sum()) and reference.positions == "target"


def test_references_that_do_not_serve():
    model, s = wrapped("internvl"), sample("internvl")
    with pytest.raises(InputError, match="no sample to average"):
        HeadAblation.reference(model, [], [(0, 1)])
    with pytest.raises(HeadError, match="empty"):
        HeadAblation.reference(model, s, [])
    known = HeadAblation.reference(model, s, [(0, 1)])
    with pytest.raises(HeadError, match="reference has no L0H2"):
        ablate([(0, 1), (0, 2)], "mean", reference=known).validate(model)
    with pytest.raises(HeadError, match="text tower"):
        ablate([(0, 1)], "mean", reference=known, tower="vision").validate(model)
    with pytest.raises(HookValueError, match="keep_tokens"):
        ablate([(0, 1)], "resample", reference=known, seed=0)
    _, cache = model.run_with_cache(s, "*hook_z")
    with pytest.raises(HookValueError, match="yet to be generated"):
        ablate([(0, 1)], "resample", "both", reference=cache)


@pytest.fixture
def reference():
    mean = torch.zeros(3, 4, 8)
    return HeadReference(mean, HeadSet([(0, 1), (2, 3)], n_layers=3, n_heads=4), 20, 2, ids=("a", None))


def test_only_heads_that_it_has_can_be_ablated(reference):
    assert reference.check(HeadSet([(2, 3)], n_layers=3, n_heads=4), "text") is None
    with pytest.raises(HeadError, match=r"The reference has no L1H0: make it with HeadAblation\.reference"):
        reference.check(HeadSet([(2, 3), (1, 0)], n_layers=3, n_heads=4), "text")
    with pytest.raises(HeadError, match="is of the text tower, the ablation of the vision tower"):
        reference.check(HeadSet([(2, 3)], n_layers=3, n_heads=4), "vision")


def test_its_origin_is_described(reference):
    assert reference.describe() == {"samples": 2, "tokens": 20, "positions": None, "ids": ["a"]}
    assert "ids" not in replace(reference, ids=(None, None)).describe()


@torch.no_grad()
def test_tokens_are_kept_in_the_order_of_the_heads(family):
    s, kept = sample(family), []
    with z_replaced(family, lambda z, l: kept.append(z), layers=[2]) as witness:
        witness(**s.inputs)
    reference = HeadAblation.reference(wrapped(family), s, [(2, 3), (2, 0)], keep_tokens=True)
    torch.testing.assert_close(reference.tokens[2], kept[0][0][:, [0, 3]])  # [token head d_head]
    assert reference.mean[:2].isnan().all() and reference.mean[2, 1].isnan().all()


def test_the_table_of_a_notebook_states_the_origin_escaped():
    heads = HeadSet(["L0H1"], n_layers=1, n_heads=2)
    reference = HeadReference(torch.zeros(1, 2, 4), heads, n_tokens=12, n_samples=3, ids=("<i>", "b", None))
    html = reference._repr_html_()
    assert "HeadReference: 1 heads" in html and "<td>L0H1</td>" in html and "<td>12</td>" in html
    assert "&lt;i&gt;" in html and "<i>" not in html

"""What a variant changes, and one hook for the edits of many variants."""

import pytest
import torch

from helpers.intervention_witness import sample
from helpers.wrapped import wrapped
from hooked_mllm import HeadAblation, Steer
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.sweep.variant import edit_by_variant, prepare


@pytest.fixture
def model():
    return wrapped("qwen3_vl")


def ablation(layer, **options):
    return HeadAblation([(layer, 1)], mode="zero", phase="prefill", **options)


def prepared(model, *variants):
    return prepare(model, variants, model.resolve(sample("qwen3_vl")))


def test_blocks_and_positions_of_variants(model):
    late = torch.zeros(1, len(sample("qwen3_vl")), dtype=torch.bool)
    late[0, -3:] = True
    both = [ablation(2, positions=late), Steer(torch.ones(32), layer=1, positions=late)]
    single, pair, vision = prepared(
        model, ablation(1), both, HeadAblation([(0, 1)], mode="zero", phase="prefill", tower="vision")
    )
    assert [v.number for v in (single, pair, vision)] == [0, 1, 2]
    assert (single.layer, single.last, single.first) == (1, 1, 0)
    assert (pair.layer, pair.last, pair.first) == (1, 2, late.shape[1] - 3)
    assert [name for name, _ in single.edits] == ["blocks.1.attn.hook_z"] and len(pair.edits) == 2
    assert (vision.layer, vision.last) == (None, -1), "outside of the language model's blocks"
    assert pair.interventions == tuple(both)


@pytest.mark.parametrize("variant", ["L0H1", None, [ablation(0), 3]], ids=str)
def test_what_is_no_variant(model, variant):
    with pytest.raises(
        HookValueError, match=r"A variant is an intervention or several, such as HeadAblation\(\.\.\.\)"
    ):
        prepared(model, variant)


def test_each_variant_has_its_own_edit_in_the_rows_of_every_sample():
    """Rows are sample by sample: row `sample * repeats + variant`."""
    activation = torch.arange(12.0).view(6, 2)  # two samples of three variants
    kept = activation.clone()

    def in_place(x, hook):
        x.zero_()
        return x

    edits = [(0, lambda x, hook: x + 100), (2, in_place), (1, lambda x, hook: None)]
    out = edit_by_variant(edits, samples=2, repeats=3)(activation, hook=HookPoint("z", tower="text", block=0))
    expected = torch.stack([kept[0] + 100, kept[1], kept[2] * 0, kept[3] + 100, kept[4], kept[5] * 0])
    assert torch.equal(out, expected) and torch.equal(activation, kept), "the activation itself is not edited"

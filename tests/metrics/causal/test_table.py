"""A table of effects on disk and as a figure."""

import torch

from helpers.intervention_witness import sample
from helpers.wrapped import wrapped
from hooked_mllm.metrics import CausalTable, PatchingEffect
from hooked_mllm.objectives import LogitDifference

DIFFERENCE = LogitDifference(5, wrong=9)


def pair(family):
    """The same question on two pictures."""
    return sample(family, 0, 0), sample(family, 1, 0)


def test_a_table_is_saved_and_drawn(tmp_path):
    model = wrapped("qwen3_vl")
    table = PatchingEffect("resid_pre", layers=[1, 2]).run(
        model, pair("qwen3_vl"), objective=DIFFERENCE, progress=False
    )
    table.save(tmp_path / "table.safetensors")
    again = CausalTable.load(tmp_path / "table.safetensors")
    assert torch.equal(again.values, table.values)
    assert (again.places, again.layers, again.name) == (table.places, table.layers, table.name)
    axes = table.plot(title="here").axes[0]
    assert axes.get_title() == "here" and axes.images[0].get_array().shape == table.shape

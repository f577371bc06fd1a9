"""Dense heads that are the same for every prompt, in each form in which they can be given."""

import json

import numpy as np
import pytest
import torch

from helpers.routing_witness import tensors
from hooked_mllm import HeadSet
from hooked_mllm.attention.routing.static import FixedHeads, StaticHeads
from hooked_mllm.errors import HeadError

MASK = np.array([[True, False, False, True], [False] * 4, [False, True, False, False]])
HEADS = HeadSet(["L0H0", "L0H3", "L2H1"], n_layers=3, n_heads=4)


@pytest.mark.parametrize(
    "heads",
    [
        HEADS,
        "L0H0, L0H3, L2H1",
        [(2, 1), (0, 3), (0, 0)],
        {0: [0, 3], 2: [1]},
        MASK,
        torch.from_numpy(MASK),
    ],
    ids=lambda heads: type(heads).__name__,
)
def test_each_layer_has_its_heads_for_every_prompt(heads):
    policy = FixedHeads(heads)
    policy.validate(3, 4)
    for length in (5, 40):
        q, k, mask = tensors(q_length=length, kv_length=length)
        assert [policy.choose(q, k, mask, 0.3, layer) for layer in range(4)] == [(0, 3), (), (1,), ()]
    assert len(policy) == 3


@pytest.mark.parametrize("policy", [FixedHeads, StaticHeads])
def test_heads_of_a_model_of_another_shape(policy):
    with pytest.raises(HeadError, match="Rank the heads of this model"):
        policy(HEADS).validate(3, 8)


def test_a_head_that_the_model_lacks():
    with pytest.raises(HeadError):
        FixedHeads("L5H0").validate(5, 4)
    assert FixedHeads("L5H0").validate(6, 4) is None


def test_static_heads_come_in_every_form():
    assert StaticHeads(MASK).heads == HEADS
    for heads in ("L0H0", [(0, 0)], {0: [0]}, (0, 0)):
        assert StaticHeads(heads).by_layer == {0: (0,)}
    with pytest.raises(HeadError, match="Layer 3"):
        StaticHeads("L3H0").validate(3, 4)


def test_what_holds_no_heads():
    with pytest.raises(HeadError):
        FixedHeads(3.5)


def test_descriptions_are_json():
    assert json.loads(json.dumps(StaticHeads(HEADS).describe())) == {
        "policy": "StaticHeads",
        "heads": ["L0H0", "L0H3", "L2H1"],
    }
    assert FixedHeads("L2H1").describe() == {"policy": "FixedHeads", "heads": ["L2H1"]}
    assert repr(FixedHeads(())).startswith("FixedHeads(")

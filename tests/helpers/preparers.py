"""Preparers of the tiny models, and the comparison of what they return with the processor's own inputs."""

from functools import cache

import torch

from helpers.tiny import tiny_config, tiny_model, tiny_processor
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.preparer import Preparer

QUESTION = "What colour is the mug?"


@cache
def preparer(family: str) -> Preparer:
    """The preparer of a tiny model."""
    config = tiny_config(family)
    return Preparer(tiny_processor(family), config, family_of(config))


@cache
def model(family: str):
    """A tiny model of plain transformers, for inputs of `preparer`."""
    return tiny_model(family)


def same(inputs: dict, expected) -> None:
    """Assert that two sets of model inputs have the same names and values."""
    assert set(inputs) == set(expected)
    for name, value in expected.items():
        assert torch.equal(inputs[name], value), name

"""One sample's attention of four layers."""

import pytest
import torch

from helpers.attention_reference import random_layers


@pytest.fixture
def layers():
    return random_layers(n_layers=4, lengths=(41,))


@pytest.fixture
def pattern(layers):
    """[layer head query key] of the only sample, in float64."""
    return torch.from_numpy(layers.attention[:, 0])

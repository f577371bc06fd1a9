"""Shapes are checked at every call."""

import pytest
import torch

from hooked_mllm.metrics import functional


def test_shapes_are_checked_at_every_call():
    pattern = torch.rand(4, 8, 41, 41)  # [layer head query key]
    with pytest.raises(Exception, match="query"):
        functional.attention_profile(pattern, torch.ones(40, dtype=torch.bool))
    with pytest.raises(Exception, match="keys"):
        functional.attention_mass(pattern, torch.ones(41, dtype=torch.bool), torch.ones(40, dtype=torch.bool))

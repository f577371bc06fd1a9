"""A tiny decoder."""

import pytest
import torch

from hooked_mllm.bench import random_text_model


@pytest.fixture(scope="module")
def model():
    return random_text_model("tiny", dtype=torch.float32)

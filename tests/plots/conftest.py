"""A sample made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.pictured import HEIGHT, WIDTH, item
from hooked_mllm.layout import Box, TokenLayout


@pytest.fixture
def sample():
    """Two images and a video of two frames: 6 + 6 + 12 visual tokens after one of text, one more after them."""
    items = [item("image", 0), item("image", 1), item("video", 0, frames=2)]
    ids = torch.tensor([1] + [9] * 24 + [2])
    layout = TokenLayout.build(ids, items, (9,), {"question": [(25, 26)]})
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)) for _ in range(2)]
    video = SimpleNamespace(frames=rng.integers(0, 255, (2, HEIGHT, WIDTH, 3), dtype=np.uint8), times_s=(0.0, 1.0))
    return SimpleNamespace(layout=layout, images=tuple(pictures), videos=(video,), target=Box(4, 0, 8, 4, image=1))

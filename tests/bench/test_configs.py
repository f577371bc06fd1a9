"""Random text decoders."""

import pytest
import torch

from hooked_mllm.bench import random_text_model
from hooked_mllm.errors import InputError


def test_weights_are_random_and_seeded():
    first, again, other = (random_text_model("tiny", dtype=torch.float32, seed=s) for s in (0, 0, 1))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
        assert bool((a == 1).all()) if name.endswith("norm.weight") else a.std() == pytest.approx(0.02, rel=0.2)
        assert name.endswith("norm.weight") or not torch.equal(a, c)
    inverse = first.rotary_emb.inv_freq
    torch.testing.assert_close(inverse, 5e6 ** -(torch.arange(0, 16, 2) / 16))


def test_an_unknown_size():
    with pytest.raises(InputError, match=r"No size 'qwen3-vl-9b'.*Did you mean 'qwen3-vl-8b'"):
        random_text_model("qwen3-vl-9b")

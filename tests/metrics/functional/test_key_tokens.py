"""Key tokens against sorting in NumPy."""

import numpy as np
import pytest
import torch

from hooked_mllm.errors import InputError
from hooked_mllm.metrics import functional


@pytest.mark.parametrize("n", [1, 7, 20, 140])
def test_key_tokens_are_the_largest_with_ties_to_the_left(n):
    values = np.random.default_rng(n).integers(0, 4, (3, n)) / 4
    chosen = functional.key_tokens(torch.from_numpy(values), 0.05)
    k = int(np.ceil(round(0.05 * n, 9)))
    for row, mask in zip(values, chosen.numpy(), strict=True):
        assert np.flatnonzero(mask).tolist() == sorted(np.argsort(-row, kind="stable")[:k])


def test_empty_sets_are_rejected(pattern):
    nothing = torch.zeros(41, dtype=torch.bool)
    profile = pattern.mean(-2)
    with pytest.raises(InputError, match="No query token"):
        functional.attention_profile(pattern, nothing)
    with pytest.raises(InputError, match="target is empty"):
        functional.key_token_ratio(profile, nothing)
    with pytest.raises(InputError, match="target is empty"):
        functional.key_token_coverage(profile[0], nothing)
    for share in (0.0, 1.01):
        with pytest.raises(InputError, match="share above 0"):
            functional.key_tokens(profile, share)

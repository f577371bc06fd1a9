"""Blocks of keys and the vector that represents each, against loops in NumPy."""

import numpy as np
import pytest
import torch

from hooked_mllm.attention.routing.pooling import KEYS, block_scores, over_blocks

GENERATOR = np.random.default_rng(0)
KEY = GENERATOR.normal(size=(2, 2, 11, 4))
QUERY = GENERATOR.normal(size=(2, 2, 3, 4))


def dot(q, k):
    """Scores of queries and keys with as many heads, without a scale."""
    return q @ k.transpose(2, 3)


def blocks(size):
    return [KEY[:, :, low : low + size] for low in range(0, 11, size)]


@pytest.mark.parametrize("size", [1, 4, 11, 64])
def test_the_last_block_is_shorter(size):
    found = over_blocks(torch.from_numpy(KEY), size, lambda x: x.amax(3))
    np.testing.assert_array_equal(found, np.stack([block.max(2) for block in blocks(size)], axis=2))


@pytest.mark.parametrize("size", [1, 4, 64])
@pytest.mark.parametrize("how", KEYS)
def test_scores_of_blocks(how, size):
    found, log_count = block_scores(dot, torch.from_numpy(QUERY), torch.from_numpy(KEY), how, size)
    want = np.zeros((2, 2, 3, len(blocks(size))))
    for index, block in enumerate(blocks(size)):
        if how == "mean":
            want[..., index] = np.einsum("bhqd,bhd->bhq", QUERY, block.mean(2))
        elif how == "sample":
            want[..., index] = np.einsum("bhqd,bhd->bhq", QUERY, block[:, :, (block.shape[2] - 1) // 2])
        elif how == "bound":
            corner = np.where(QUERY > 0, block.max(2)[:, :, None], block.min(2)[:, :, None])
            want[..., index] = (QUERY * corner).sum(-1)
    count = [block.shape[2] for block in blocks(size)]
    if how == "exact":
        want, count = np.einsum("bhqd,bhkd->bhqk", QUERY, KEY), [1] * 11
    np.testing.assert_allclose(found, want, atol=1e-12)
    np.testing.assert_allclose(log_count, np.log(count), atol=1e-12)


@pytest.mark.parametrize("how", KEYS)
def test_half_precision_is_summed_in_float32(how):
    q, k = (torch.from_numpy(x).bfloat16() for x in (QUERY, KEY))
    found, log_count = block_scores(lambda a, b: dot(a.float(), b.float()), q, k, how, 4)
    exact, _ = block_scores(dot, q.double(), k.double(), how, 4)
    assert found.dtype == log_count.dtype == torch.float32
    np.testing.assert_allclose(found, exact, atol=1e-5)

"""Keys, values and masks of the end of a sequence, against slices and loops written out here."""

import numpy as np
import pytest
import torch

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.site import AttentionCall
from hooked_mllm.sweep.prefix import Prefix, suffix_mask

LENGTH, START = 6, 2  # the second sample begins with two positions of padding


@pytest.fixture
def call():
    """A recorded call of one block: two samples of six positions, two key-value heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, LENGTH, 4, generator=generator) for heads in (4, 2, 2))
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[1, :START] = False
    mask = MaskRows(2, LENGTH, LENGTH, "cpu", causal=True, padding=real)
    return AttentionCall(q=q, k=k, v=v, mask=mask, scale=0.5, layer=0, tower="text")


def test_keys_before_the_first_position_are_the_recorded_ones(call):
    new_k, new_v = torch.ones(6, 2, LENGTH - 4, 4), torch.zeros(6, 2, LENGTH - 4, 4)
    k, v = Prefix(call, first=4, repeats=3).update(new_k, new_v, 0, cache_position=None)
    assert k.shape == v.shape == (6, 2, LENGTH, 4)
    for row in range(6):  # three rows of each sample
        assert torch.equal(k[row, :, :4], call.k[row // 3, :, :4]) and torch.equal(
            v[row, :, :4], call.v[row // 3, :, :4]
        )
    assert (k[:, :, 4:] == 1).all() and (v[:, :, 4:] == 0).all()


@pytest.mark.parametrize("first", [0, 1, 4])
def test_the_mask_of_late_queries(call, first):
    boolean = suffix_mask(call, first, "sdpa")
    additive = suffix_mask(call, first, "eager")
    assert boolean.shape == additive.shape == (2, 1, LENGTH - first, LENGTH)
    for batch, query, key in np.ndindex(2, LENGTH - first, LENGTH):
        position, start = query + first, START if batch else 0
        visible = start <= key <= position
        if position < start:  # padding, which attends to nothing
            visible = True
        assert bool(boolean[batch, 0, query, key]) == visible
        assert (additive[batch, 0, query, key] == 0) == visible
    assert additive.min() == (torch.finfo(torch.float32).min if first < LENGTH - 1 else 0)


def test_no_row_of_the_mask_becomes_nan(call):
    for implementation in ("sdpa", "eager"):
        mask = suffix_mask(call, 0, implementation)
        q, k, v = call.q, call.k.repeat_interleave(2, 1), call.v.repeat_interleave(2, 1)
        z = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert z.isfinite().all()

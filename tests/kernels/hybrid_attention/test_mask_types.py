"""Block-Sparse-Attention's mask types against masks written out here in NumPy."""

import numpy as np
import pytest
import torch

from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.kernels.hybrid_attention import (
    hybrid_attention,
    pattern_from_mask_types,
    visible_keys,
)


@pytest.mark.parametrize("flat", [True, False])
def test_mask_types_with_sizes_in_tokens(flat):
    """ "Exact" streaming: key j is hidden iff j < i - (local - 1) and j >= sink."""
    info = torch.tensor([[3, 5], [9, 9], [3, 5], [3, 5]])  # the second head is dense: its sizes are not read
    pattern = pattern_from_mask_types(torch.tensor([-1, 0, -1, -1]), info.flatten() if flat else info)
    assert pattern == ((1,), 3, 5)
    n = 20
    i, j = np.arange(n)[:, None], np.arange(n)
    streaming = (j <= i) & ~((j < i - (5 - 1)) & (j >= 3))
    dense = torch.tensor([False, True, False, False])
    ours = visible_keys(dense, n, n, pattern.sink, pattern.window, torch.tensor([0]), torch.tensor([n]))[0]
    assert (ours[0].numpy() == streaming).all() and (ours[1].numpy() == (j <= i)).all()


def test_sizes_in_blocks_hold_every_key_of_the_block_window():
    block, n, sinks, local = 4, 30, 1, 2
    dense, sink, window = pattern_from_mask_types([-1], [sinks, local], block=block)
    assert (dense, sink, window) == ((), 4, 8)
    i, j = np.arange(n)[:, None], np.arange(n)
    block_mask = (j <= i) & ((j // block < sinks) | (j // block > i // block - local))
    flags = torch.tensor([False])
    ours = visible_keys(flags, n, n, sink, window, torch.tensor([0]), torch.tensor([n]))[0, 0].numpy()
    assert (ours >= block_mask).all()
    last = np.arange(n) % block == block - 1  # at the last place of a block the two agree
    assert (ours[last] == block_mask[last]).all()


def test_a_layer_without_streaming_heads():
    assert pattern_from_mask_types([0, 0], [0, 0, 0, 0]).dense == (0, 1)


def test_a_pattern_is_what_the_op_takes():
    q, k, v = (torch.randn(1, heads, 24, 16) for heads in (4, 2, 2))
    pattern = pattern_from_mask_types([-1, 0, 0, -1], [2, 6] * 4)
    z = hybrid_attention(q, k, v, **pattern._asdict(), implementation="naive")
    assert torch.equal(z, hybrid_attention(q, k, v, [1, 2], sink=2, window=6, implementation="naive"))


@pytest.mark.parametrize(
    ("types", "info", "settings", "error", "message"),
    [
        ([1, 0, 2], [1, 1] * 3, {}, HeadError, r"Heads \[0, 2\] .*block masks"),
        ([-2, 0], [1, 1] * 2, {}, HeadError, r"\[0\]"),
        ([0, -1], [1, 1, 1], {}, InputError, "streaming_info"),
        (torch.tensor([[0, -1]]), [1, 1] * 2, {}, InputError, "one integer"),
        ([], [], {}, InputError, "one integer"),
        (torch.tensor([0.5, -1]), [1, 1] * 2, {}, InputError, "integers"),
        ([True, False], [1, 1] * 2, {}, InputError, "integers"),
        ([-1, -1], [1, 4, 2, 4], {}, InputError, "share one sink"),
        ([-1, 0], [1, 0] * 2, {}, InputError, "local size"),
        ([-1, 0], [-1, 3] * 2, {}, InputError, "sink"),
        ([-1, 0], [1, 3] * 2, {"block": 0}, InputError, "block"),
    ],
)
def test_mask_types_that_do_not_fit(types, info, settings, error, message):
    with pytest.raises(error, match=message):
        pattern_from_mask_types(types, info, **settings)

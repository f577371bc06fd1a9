"""Estimates of lost attention against NumPy in float64."""

import numpy as np
import pytest
import torch

from helpers.routing_witness import SINK, WINDOW, padded, policy, tensors, witness
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.routing import PerLayer, lost_attention
from hooked_mllm.attention.routing.lost_attention import KEYS, block_scores, over_blocks
from hooked_mllm.errors import InputError


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("m", [1, 7, 64])
def test_lost_attention_is_that_of_loops_in_float64(heads, kv_heads, m, order):
    q, k, mask = tensors(heads, kv_heads, batch=2)
    rows = range(max(0, 40 - m), 40)
    due = [witness(q[b], k[b], rows, rows, 0, order=order) for b in range(2)]
    how = {"sink": SINK, "window": WINDOW, "queries": m, "order": order}
    for piece in (1 << 28, 1):  # all keys at once, one key at a time
        found = lost_attention(q, k, mask, 0.3, **how, max_bytes=piece)
        np.testing.assert_allclose(found, due, rtol=1e-5)
    assert found.dtype == torch.float32
    half = lost_attention(q.bfloat16(), k.bfloat16(), mask, 0.3, **how)
    due = [witness(q[b].bfloat16(), k[b].bfloat16(), rows, rows, 0, order=order) for b in range(2)]
    np.testing.assert_allclose(half, due, rtol=1e-4)


def test_padding_moves_the_sink_and_the_last_tokens():
    q, k, _ = tensors(batch=5)
    spans = [(0, 40), (9, 40), (0, 31), (33, 40), (0, 0)]
    found = lost_attention(q, k, padded(5, 40, spans), 0.3, sink=SINK, window=WINDOW, queries=6)
    for b, (start, end) in enumerate(spans[:4]):
        rows = range(max(start, end - 6), end)
        np.testing.assert_allclose(found[b], witness(q[b], k[b], rows, rows, start), rtol=1e-5)
    assert found[3].max() == 0 == found[4].max()  # 7 tokens, all in sink or window; and no token at all


def test_a_chunk_of_a_prompt_sees_the_cache_before_it():
    q, k, mask = tensors(q_length=10, kv_length=40)
    found = lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, queries=4)
    np.testing.assert_allclose(found[0], witness(q[0], k[0], range(6, 10), range(36, 40), 0), rtol=1e-5)


def test_queries_by_mask():
    q, k, _ = tensors(batch=2)
    chosen = torch.zeros(2, 40, dtype=torch.bool)
    chosen[0, [20, 22, 23]] = chosen[1, 30:34] = True
    mask = padded(2, 40, [(0, 40), (12, 40)])
    found = lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, queries=chosen)
    for b, (rows, start) in enumerate([([20, 22, 23], 0), (range(30, 34), 12)]):
        np.testing.assert_allclose(found[b], witness(q[b], k[b], rows, rows, start), rtol=1e-5)
    with pytest.raises(InputError, match="mask of queries is empty"):
        lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, queries=chosen & (torch.arange(40) < 30))
    made = policy(PerLayer(1), queries=chosen)
    with pytest.raises(InputError, match=r"\[2, 40\], the prompt has 1 x 30"):
        made.choose(*tensors(q_length=30, kv_length=30), 0.3, 0)


def test_blocks_bound_the_mass_and_of_one_key_are_exact():
    q, k, mask = tensors()
    how = {"sink": SINK, "window": WINDOW, "queries": 6}
    exact = lost_attention(q, k, mask, 0.3, **how)
    for keys in ("mean", "bound", "sample"):
        torch.testing.assert_close(lost_attention(q, k, mask, 0.3, **how, keys=keys, block=1), exact)
    for block in (2, 5, 64):
        low, high = (lost_attention(q, k, mask, 0.3, **how, keys=keys, block=block) for keys in ("mean", "bound"))
        assert (low < exact).all() and (exact < high).all()


@pytest.mark.parametrize("piece", [1 << 28, 1])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("keys", ["mean", "bound", "sample"])
def test_blocks_are_summed_as_in_the_formula(keys, order, piece):
    q, k, mask = tensors(heads=2, kv_heads=1)
    how = {"queries": 6, "keys": keys, "order": order, "block": 4, "max_bytes": piece}
    found = lost_attention(q, k, mask, 0.3, sink=SINK, window=WINDOW, **how)
    queries, key = q[0].double().numpy(), k[0, 0].double().numpy()
    for head in range(2):
        lost = []
        for p in range(34, 40):
            x = queries[head, p]
            tail = max(SINK, 34 - WINDOW + 1)  # some of the six have these keys in their window
            blocks = [key[low : min(low + 4, tail)] for low in range(SINK, tail, 4)]
            if keys == "mean":
                scores = [b.mean(0) @ x for b in blocks]
            elif keys == "sample":
                scores = [b[(len(b) - 1) // 2] @ x for b in blocks]
            else:
                scores = [np.maximum(b.max(0) * x, b.min(0) * x).sum() for b in blocks]
            e, n = np.exp(0.3 * np.array(scores)), np.array([len(b) for b in blocks])
            single = np.exp(0.3 * key[: p + 1] @ x)
            far, near = single[tail : p - WINDOW + 1], np.r_[single[:SINK], single[tail:]]
            total = (n * e).sum() + near.sum()
            lost.append(((n * e**order).sum() + (far**order).sum()) ** (1 / order) / total)
        np.testing.assert_allclose(found[0, head], min(1, np.mean(lost)), rtol=1e-5)


def test_a_mean_of_64_keys_hides_one_that_stands_out():
    q, k = torch.ones(1, 1, 200, 8), torch.zeros(1, 1, 200, 8)
    k[0, 0, 70] = 1.0  # its score is 16 above the others'
    found = {
        keys: float(lost_attention(q, k, MaskRows.causal_rows(1, 200, "cpu"), 2.0, sink=4, window=16, keys=keys))
        for keys in ("exact", "mean", "bound")
    }
    assert found["exact"] > 0.99 and found["bound"] > 0.99 and found["mean"] < 0.9


def test_extreme_scores_stay_finite():
    q, k, mask = tensors()
    for keys in ("exact", "mean", "bound", "sample"):
        found = lost_attention(100 * q, 100 * k, mask, 1.0, sink=SINK, window=WINDOW, keys=keys, block=4)
        assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()


# -- blocks of keys, against loops in NumPy ----------------------------------------------------------------------------

GENERATOR = np.random.default_rng(0)
KEY = GENERATOR.normal(size=(2, 2, 11, 4))
QUERY = GENERATOR.normal(size=(2, 2, 3, 4))


def dot(q, k):
    """Scores of queries and keys with the same number of heads, without a scale."""
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
    expected = np.zeros((2, 2, 3, len(blocks(size))))
    for index, block in enumerate(blocks(size)):
        if how == "mean":
            expected[..., index] = np.einsum("bhqd,bhd->bhq", QUERY, block.mean(2))
        elif how == "sample":
            expected[..., index] = np.einsum("bhqd,bhd->bhq", QUERY, block[:, :, (block.shape[2] - 1) // 2])
        elif how == "bound":
            corner = np.where(QUERY > 0, block.max(2)[:, :, None], block.min(2)[:, :, None])
            expected[..., index] = (QUERY * corner).sum(-1)
    count = [block.shape[2] for block in blocks(size)]
    if how == "exact":
        expected, count = np.einsum("bhqd,bhkd->bhqk", QUERY, KEY), [1] * 11
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(log_count, np.log(count), atol=1e-12)


@pytest.mark.parametrize("how", KEYS)
def test_half_precision_is_summed_in_float32(how):
    q, k = (torch.from_numpy(x).bfloat16() for x in (QUERY, KEY))
    found, log_count = block_scores(lambda a, b: dot(a.float(), b.float()), q, k, how, 4)
    exact, _ = block_scores(dot, q.double(), k.double(), how, 4)
    assert found.dtype == log_count.dtype == torch.float32
    np.testing.assert_allclose(found, exact, atol=1e-5)

"""Patterns cost memory in N until one is read, and then only for the rows that are read."""

import pytest
import torch

from helpers.cache_witness import attentions, close, hooked, plain, sample, sizes
from helpers.tiny import tiny_model
from hooked_mllm import HookedMLLM
from hooked_mllm.cache.lazy import GrowingKeys, LazyKeys, LazyPattern, LazyResult
from hooked_mllm.errors import NumericsError


def tokens(n: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(200, 400, (1, n), generator=torch.Generator().manual_seed(n))}


def run(family: str, n: int, **options):
    return hooked(family, layers=2).run_with_cache(tokens(n), **options)


def test_caching_everything_makes_nothing_of_size_n_by_n(family):
    held = {}
    for n in (256, 512):
        with sizes() as plain_made:
            hooked(family, layers=2)(tokens(n))
        with sizes() as made:
            _, cache = run(family, n)
            assert ("pattern", 1) in cache and ("attn_scores", 1) in cache
            repr(cache)
        assert max(made) == max(plain_made) < n * n * 4
        held[n] = cache.nbytes
    assert held[512] == 2 * held[256]


def test_reading_rows_computes_only_those_rows(family):
    n, rows = 640, [3, 500, 77]
    _, cache = run(family, n)
    with sizes() as made:
        cache.pattern(1, queries=rows, keys=[0, 1])
    assert max(made) <= n * 32  # q itself
    with sizes() as made:
        cache["pattern", 1]
    assert max(made) >= n * n


@pytest.mark.parametrize("n", [8192, 32768])
def test_long_prompts_hold_bytes_in_proportion_to_their_tokens(n):
    model = hooked("qwen3_vl", layers=1)
    one_row = lambda q, k, v, mask, scale, layer: (q * 1.0).transpose(1, 2)  # noqa: E731 (a quick attention)
    with model.attention(one_row), sizes() as made:
        _, cache = model.run_with_cache(tokens(n), return_logits=False)
    assert max(made) < 64 * n  # 48 numbers a token are the widest activation
    _, small = model.run_with_cache(tokens(1024), return_logits=False)
    assert cache.nbytes == small.nbytes * n // 1024
    rows = [0, 5, n - 1]
    got = cache.pattern(0, queries=rows, keys=[0, n // 2, n - 1])
    q, k = cache["rot_q", 0], cache["rot_k", 0].repeat_interleave(2, dim=2)
    scores = torch.einsum("qhd,khd->hqk", q[0, rows].double(), k[0].double()) * model.cfg.d_head**-0.5
    scores.masked_fill_(torch.arange(n) > torch.tensor(rows)[:, None], float("-inf"))
    close(got[0].double(), scores.softmax(-1)[..., [0, n // 2, n - 1]])
    assert got[0, :, 0, 0].eq(1).all()


def test_a_window_a_mask_of_ones_own_and_padding_are_those_of_the_model():
    ids = tokens(24)["input_ids"]
    slid = tiny_model("llava_onevision")
    config = slid.config.text_config
    config.sliding_window, config.layer_types = 6, ["full_attention", "sliding_attention", "sliding_attention"]
    for layer, block in enumerate(slid.model.language_model.layers):
        block.self_attn.sliding_window = 6 if layer else None
        block.attention_type = "sliding_attention" if layer else "full_attention"
    slid.model.language_model.has_sliding_layers = True
    model = HookedMLLM.from_model(slid, check=False)
    padding = torch.ones_like(ids)
    padding[:, :3] = 0
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": padding}):
        _, cache = model.run_with_cache(inputs)
        with model.attention("eager"), torch.no_grad():
            expected = slid(**inputs, output_attentions=True, use_cache=False).attentions
        real = slice(3, None) if "attention_mask" in inputs else slice(None)
        for layer, weights in enumerate(expected):
            close(cache["pattern", layer][:, :, real], weights[:, :, real])
        assert not cache["pattern", 1][0, :, 20, :15].any() and cache["pattern", 0][0, :, 20, 4:15].all()


def test_a_mask_of_ones_own_is_kept_and_counted():
    model, inputs = hooked("internvl"), tokens(20)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    mask[..., 4:9] &= torch.eye(20, dtype=torch.bool)[:, 4:9]  # hides five keys from all but themselves
    _, without = model.run_with_cache(inputs, "blocks.*hook_pattern")
    _, cache = model.run_with_cache({**inputs, "attention_mask": mask}, "blocks.*hook_pattern")
    with torch.no_grad():
        expected = plain("internvl")(
            **inputs, attention_mask=torch.where(mask, 0.0, torch.finfo(torch.float32).min), output_attentions=True
        ).attentions
    for layer, weights in enumerate(expected):
        close(cache["pattern", layer], weights)
    assert cache.nbytes > without.nbytes


def test_results_are_kept_as_z(family):
    model = hooked(family)
    _, z = model.run_with_cache(sample(family), "blocks.*hook_z")
    _, results = model.run_with_cache(sample(family), ["blocks.*hook_z", "blocks.*hook_result"])
    assert results.nbytes == z.nbytes
    for moved in (results.to("cpu"), results.sample(0)):
        assert moved.nbytes == z.nbytes
        assert isinstance(moved.entry(("result", 0)), LazyResult)


def test_half_precision_rows_are_softmaxed_in_float32(family):
    model = hooked(family, dtype=torch.bfloat16)
    _, cache = model.run_with_cache(sample(family).to(dtype=torch.bfloat16))
    q, k = cache["rot_q", 1].float(), cache["rot_k", 1].float().repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * model.cfg.d_head**-0.5
    n = q.shape[1]
    pattern = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")).softmax(-1)
    assert cache["pattern", 1].dtype == torch.float32
    close(cache["pattern", 1], pattern)


def test_half_precision_that_overflowed_is_named():
    model = hooked("qwen3_vl")
    _, cache = model.run_with_cache(sample("qwen3_vl"), "blocks.1.attn.hook_pattern")
    entry = cache.entry(("pattern", 1))
    assert isinstance(entry, LazyPattern)
    entry.q[0, 2, 4, 0] = float("nan")
    close(cache.pattern(1, queries=[0, 1]), attentions("qwen3_vl", sample("qwen3_vl").inputs)[1][:, :, :2])
    with pytest.raises(NumericsError, match=r"blocks\.1\.attn\.hook_pattern is not finite.*bfloat16"):
        cache["pattern", 1]


def test_growing_keys_hold_each_key_once():
    keys = GrowingKeys()
    k = torch.randn(1, 2, 9, 4)
    for chunk in k.split([5, 1, 3], dim=2):
        keys.chunks.append(chunk.clone())
    assert keys.length == 9
    for n in (9, 5, 1):
        assert torch.equal(keys.upto(n), k[:, :, :n])
    entry = LazyKeys(keys, 6)
    assert entry.shape == (1, 6, 2, 4) and torch.equal(entry.tensor(), k[:, :, :6].transpose(1, 2))
    assert sum(t.nbytes for t in entry.parts()) == k.nbytes

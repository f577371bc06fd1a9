"""A prompt read in chunks is cached as one read at once: every activation, pattern and name of a position."""

import pytest
import torch

from helpers.wrapped import wrapped
from hooked_mllm import HookedMLLM, HybridAttention
from hooked_mllm.attention.routing import PerLayer, QueryAwareHeads
from hooked_mllm.cache import GenerationCache
from hooked_mllm.cache.lazy import LazyResult, LazyRows
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.toys import VisualRetrieval

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
LENGTH = 22


def prompt(batch: int = 1, padded: int = 0) -> dict[str, torch.Tensor]:
    """Tokens without images, some padded on the left."""
    ids = torch.randint(10, 40, (batch, LENGTH), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model, inputs, chunk, names=None, **options):
    """The caches of a generation with the prompt at once, and in chunks."""
    generate = {**GREEDY, **options.pop("generate", {})}
    tokens, whole = model.run_with_cache(inputs, names, generate=generate, **options)
    generate |= {"prefill_chunk_size": chunk}
    chunked_tokens, chunked = model.run_with_cache(inputs, names, generate=generate, **options)
    assert torch.equal(tokens, chunked_tokens) and len(whole) == len(chunked)
    return whole, chunked


def equal(whole, chunked, atol=2e-4) -> None:
    """The same names, shapes and values in every step, and joined."""
    for a, b in zip(whole, chunked, strict=True):
        assert list(a) == list(b)
        for name in a:
            torch.testing.assert_close(b[name], a[name], atol=atol, rtol=1e-3, equal_nan=True, msg=name)
    for name in whole.steps[0]:
        torch.testing.assert_close(chunked[name], whole[name], atol=atol, rtol=1e-3, equal_nan=True, msg=name)


@pytest.mark.parametrize("chunk", [1, 5, 11, LENGTH, 40])
def test_every_activation(family, chunk):
    whole, chunked = both(wrapped(family), prompt(), chunk)
    equal(whole, chunked)
    if chunk < LENGTH:  # nothing is computed before it is read
        step = chunked.steps[0]
        assert isinstance(step.entry(("pattern", 1)), LazyRows) and isinstance(step.entry(("result", 1)), LazyResult)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"queries": [3, 20, -1]},
        {"queries": [3, 20, 7], "keys": slice(2, 15)},
        {"keys": "text"},
        {"pos_slice": [20, 3, 9]},
        {"queries": "last", "keys": torch.arange(LENGTH) > 9},
        {"device": "cpu", "pos_slice": [1, -1], "queries": [8]},
    ],
)
@pytest.mark.parametrize("chunk", [1, 7])
def test_selected_rows_and_columns_with_padding(family, chunk, options):
    equal(*both(wrapped(family), prompt(2, padded=6), chunk, **options))


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
@pytest.mark.parametrize("chunk", [3, 7])  # the last chunk is one token
def test_hybrid_attention_sees_the_same_keys_in_chunks(family, chunk):
    model = wrapped(family)
    with model.attention(HybridAttention([(0, 0), (1, 2)], sink=2, window=5)):
        whole, chunked = both(model, prompt(2, padded=3), chunk)
    equal(whole, chunked)
    _, dense = model.run_with_cache(prompt(2, padded=3), "*hook_pattern", generate=GREEDY)
    assert not torch.allclose(dense["pattern", 1], whole["pattern", 1], atol=1e-3)


def test_heads_that_depend_on_the_whole_prompt_are_rejected_in_chunks():
    model = wrapped("internvl")
    policy = QueryAwareHeads(PerLayer(2), queries=4)
    with model.attention(HybridAttention(policy)), pytest.raises(UnsupportedModelError, match="the whole prompt"):
        model.generate(prompt(), prefill_chunk_size=7, **GREEDY)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_hybrid_attention_rejects_prompts_together_with_generated_tokens(options):
    model, ids = wrapped("internvl"), torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
    attention = HybridAttention([(0, 0)], sink=1, window=3, implementation="naive")
    with model.attention(attention), pytest.raises(UnsupportedModelError, match="generated tokens, too"):
        model.generate({"input_ids": ids}, **GREEDY, **options)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("blocks.1.attn.hook_pattern", lambda x, hook: x * 0.5),
        ("blocks.1.attn.hook_attn_scores", lambda x, hook: x + torch.arange(x.shape[1])[:, None, None]),
        ("blocks.1.attn.hook_rot_k", lambda x, hook: x * 0.5),
        ("blocks.0.hook_resid_post", lambda x, hook: x * 2),
        ("blocks.1.attn.hook_result", lambda x, hook: x * 2),
    ],
)
def test_what_hooks_edit(family, name, edit):
    model = wrapped(family)
    with model.hooks([(name, edit)]):
        equal(*both(model, prompt(), 7, "blocks.*"))
        equal(*both(model, prompt(), 7, "blocks.1.*", queries=[20, 3], keys=[1, 15]))
        equal(*both(model, prompt(), 7, "blocks.1.*", pos_slice=[20, 3]))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"num_return_sequences": 2}])
def test_beams_sequences_and_static_caches(family, options):
    if "num_return_sequences" in options:
        options |= {"num_beams": 2}
    whole, chunked = both(wrapped(family), prompt(2, padded=6), 7, "blocks.*", generate=options)
    equal(whole, chunked)
    for step in chunked.steps[:2]:
        assert torch.equal(
            step.pattern(1, keys="text"), step.pattern(1, keys=prompt(2, padded=6)["attention_mask"] > 0)
        )


@pytest.mark.parametrize("toy", ["toy-qwen3-vl", "toy-llava-onevision", "toy-internvl"])
def test_images_whose_features_are_split_over_chunks(toy):
    model = HookedMLLM.from_pretrained(toy, dtype="float32")
    sample = VisualRetrieval(pages=1).samples(model, 1)[0]
    try:
        whole, chunked = both(model, sample, 16)
    except ValueError as error:  # older versions of transformers do not split images
        assert "Chunked prefill" in str(error)
        return
    equal(whole, chunked, atol=1e-3)
    for kind in ("target", "visual", "question", "last"):
        torch.testing.assert_close(
            chunked.pattern(2, queries="question", keys=kind),
            whole.steps[0].pattern(2, "question", kind),
            atol=1e-4,
            rtol=0,
        )
    total = chunked.joined.decompose_resid().sum(0)
    torch.testing.assert_close(total, chunked.joined.accumulated_resid()[-1], atol=1e-3, rtol=1e-4)


def test_round_trip(tmp_path):
    _, chunked = both(wrapped("qwen3_vl"), prompt(2, padded=6), 7, queries=[3, 20])
    chunked.save(tmp_path / "g")
    again = GenerationCache.load(tmp_path / "g", wrapped("qwen3_vl"))
    for a, b in zip(chunked, again, strict=True):
        for name in a:
            torch.testing.assert_close(b[name], a[name], atol=1e-6, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(again.pattern(1, [3], "text"), chunked.pattern(1, [3], "text"), equal_nan=True)
    assert isinstance(again.steps[0].entry(("pattern", 0)), LazyRows)


def test_memory_of_selected_rows_does_not_grow_with_the_number_of_chunks():
    model, held = wrapped("qwen3_vl"), []
    for chunk in (1, 11):
        _, cache = model.run_with_cache(
            prompt(), "*hook_pattern", queries=[3, 20], generate={**GREEDY, "prefill_chunk_size": chunk}
        )
        held.append(sum(call.q.nbytes for call in cache.steps[0].entry(("pattern", 1)).calls))
    assert held[0] == held[1]

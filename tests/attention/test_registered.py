"""Hybrid attention by name in plain decoders of transformers, against eager attention with a mask for every head."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    StaticCache,
)

from helpers.hybrid_witness import keep_half_of_the_heads
from helpers.registered_witness import (
    CLASSES,
    DENSE,
    HEADS,
    LAYERS,
    NAME,
    SINK,
    SIZES,
    WINDOW,
    close,
    decoder,
    hidden,
    prompts,
    register,
)
from helpers.wrapped import fresh, model_inputs, wrapped
from hooked_mllm import HeadSet, HybridAttention, register_hybrid_attention
from hooked_mllm.errors import HeadError, HookValueError, InputError, UnsupportedModelError


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("batch", "side"), [(1, "left"), (3, "left"), (3, "right")])
@torch.no_grad()
def test_logits_of_a_prompt(kind, batch, side):
    register()
    inputs, start = prompts(batch, side=side)
    eager, hybrid = decoder(kind), decoder(kind, NAME)
    with hidden(eager, start):
        expected = eager(**inputs).logits
    got, real = hybrid(**inputs).logits, inputs["attention_mask"].bool()
    close(got[real], expected[real])
    assert (got - eager(**inputs).logits)[real].abs().max() > 0.05
    if batch == 1:
        close(hybrid(input_ids=inputs["input_ids"]).logits, expected)


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_generation(kind):
    register()
    inputs, start = prompts()
    eager, hybrid = decoder(kind), decoder(kind)
    hybrid.set_attn_implementation(NAME)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with hidden(eager, start):
        expected = eager.generate(**inputs, **options)
    got = hybrid.generate(**inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_prompt_in_chunks_and_a_static_cache(batch):
    register()
    inputs, start = prompts(batch)
    eager, hybrid = decoder("qwen3"), decoder("qwen3", NAME)
    with hidden(eager, start):
        expected = eager(**inputs).logits
    real = inputs["attention_mask"].bool()
    for past in (None, StaticCache(hybrid.config, max_cache_len=30)):
        parts = []
        for part in (slice(0, 9), slice(9, 23)):
            step = {
                "input_ids": inputs["input_ids"][:, part],
                "attention_mask": inputs["attention_mask"][:, : part.stop],
            }
            out = hybrid(**step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
        close(torch.cat(parts, dim=1)[real], expected[real])


@torch.no_grad()
def test_a_head_set_names_and_a_policy_name_the_same_heads():
    inputs, _ = prompts()
    model, results = decoder("llama", NAME), []

    class Policy:
        def choose(self, q, k, mask, scale, layer):
            return DENSE.get(layer, ())

        def validate(self, n_layers, n_heads):
            assert (n_layers, n_heads) == (LAYERS, HEADS)

        def describe(self):
            return {"policy": "fixed"}

    pairs = [(layer, head) for layer, heads in DENSE.items() for head in heads]
    names = [f"L{layer}H{head}" for layer, head in pairs]
    for heads in (DENSE, pairs, names, ", ".join(names), HeadSet(pairs, n_layers=LAYERS, n_heads=HEADS), Policy()):
        register(heads)  # a name may be registered again: the model runs what it names now
        results.append(model(**inputs).logits)
    assert all(torch.equal(result, results[0]) for result in results)
    register([])
    assert not torch.equal(model(**inputs).logits, results[0])


@torch.no_grad()
def test_layers_with_a_sliding_window_keep_it():
    register()
    inputs, start = prompts()
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    for side in ("left", "right"):
        inputs, _ = prompts(side=side)
        plain, hybrid = decoder("qwen2", "sdpa", **window), decoder("qwen2", NAME, **window)
        assert torch.equal(hybrid(**inputs).logits, plain(**inputs).logits)
    some = {**window, "max_window_layers": 2}  # the last layer alone
    eager, hybrid = decoder("qwen2", **some), decoder("qwen2", NAME, **some)
    inputs, start = prompts()
    with hidden(eager, start, {**DENSE, 2: tuple(range(HEADS))}):
        expected = eager(**inputs).logits
    real = inputs["attention_mask"].bool()
    close(hybrid(**inputs).logits[real], expected[real])


@torch.no_grad()
def test_a_4d_mask_is_accepted_if_it_is_causal_and_rejected_if_not():
    register()
    inputs, _ = prompts(1)
    model = decoder("qwen3", NAME)
    expected = model(**inputs).logits
    ids, n = inputs["input_ids"], 23
    causal = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
    assert torch.equal(model(ids, attention_mask=causal).logits, expected)
    with pytest.raises(UnsupportedModelError, match="need a causal mask.*Use attention='sdpa'"):
        model(ids, attention_mask=causal | (torch.arange(n) < 4))
    with pytest.raises(UnsupportedModelError, match="need a causal mask"):  # packed sequences
        model(ids, position_ids=torch.cat([torch.arange(10), torch.arange(13)])[None], use_cache=False)
    holes = inputs["attention_mask"].clone()
    holes[0, 7] = 0
    with pytest.raises(UnsupportedModelError, match="padding at the ends"):
        model(ids, attention_mask=holes)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_generation_into_a_static_cache(padded):
    register()
    inputs, start = prompts(2 if padded else 1)
    eager, hybrid = decoder("qwen3"), decoder("qwen3", NAME)
    with hidden(eager, start):
        expected = eager.generate(**inputs, max_new_tokens=5, do_sample=False)
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    assert torch.equal(hybrid.generate(**inputs, **options), expected)


@torch.no_grad()
def test_a_wrapped_model_under_the_name_shows_what_it_runs(family):
    """By name, the language model of a multimodal one; wrapped, its patterns and scores are the hybrid ones."""
    inputs, by_name = model_inputs(family, 1, 2), fresh(family)
    register()
    by_name.set_attn_implementation({"text_config": NAME})
    model, backend = wrapped(family), HybridAttention(DENSE, sink=SINK, window=WINDOW, implementation="naive")
    with model.attention(backend):
        logits, cache = model.run_with_cache(inputs)
        settings, tokens = model.info.attention_settings, model.generate(inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(by_name(**inputs).logits, logits)
    assert torch.equal(by_name.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)
    with model.attention(NAME):
        assert model.info.attention_settings == settings and NAME in model.info.attention
        assert torch.equal(model(inputs), logits)
        got, again = model.run_with_cache(inputs)
        assert torch.equal(got, logits) and all(torch.equal(again[name], cache[name]) for name in cache)
        register(["L7H0"])
        with pytest.raises(HeadError, match="Layer 7 of head L7H0"):
            model.run_with_cache(inputs)
    assert model.info.attention == "sdpa"


# -- rejected ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_heads_of_another_model_are_rejected_when_it_first_runs():
    inputs, _ = prompts()
    register(["L0H0"])
    model = decoder("qwen3", NAME)
    for heads, message in (
        (["L3H0"], "Layer 3 of head L3H0 is not there"),
        ([(0, 4)], "Head 4 of L0H4 is not there"),
        (
            HeadSet(["L0H0"], n_layers=36, n_heads=32),
            r"model of 36 x 32 \(layers x heads\); this model has 3 x 4.*'sdpa'",
        ),
    ):
        register(heads)
        with pytest.raises(HeadError, match=message):
            model(**inputs)


@torch.no_grad()
def test_a_part_of_the_heads_is_rejected():
    inputs, _ = prompts()
    register(["L0H1"])
    model = decoder("llama", NAME)
    keep_half_of_the_heads(model.model.layers)
    with pytest.raises(HeadError, match=r"2 heads in this process and 4 in the whole model.*device_map"):
        model(**inputs)


def test_what_cannot_be_registered():
    for name in ("sdpa", "eager", "flash_hybrid", "a/b", ""):
        with pytest.raises(HookValueError, match="of its own|cannot name"):
            register_hybrid_attention(name, [])
    for heads in ([[0, 1]], [3], 3, ["H3"], [(0, -1)], [(0.5, 1)]):
        with pytest.raises(HeadError):
            register(heads)
    with pytest.raises(InputError, match="sink >= 0 and window >= 1"):
        register(window=0)
    with pytest.raises(HookValueError, match="implementation is one of"):
        register(implementation="fast")


@torch.no_grad()
def test_models_with_more_to_their_attention_are_rejected():
    register([])
    ids, _ = prompts(1)
    with pytest.raises(UnsupportedModelError, match="is causal and this module is not. Use 'sdpa'"):
        config = BertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
        BertModel._from_config(config, attn_implementation=NAME).eval()(**ids)
    gemma = Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * LAYERS)
    with pytest.raises(UnsupportedModelError, match="passes `softcap`"):
        Gemma2ForCausalLM._from_config(gemma, attn_implementation=NAME).eval()(**ids)
    sinks = GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, layer_types=["full_attention"] * LAYERS)
    with pytest.raises(UnsupportedModelError, match="passes `s_aux`"):
        GptOssForCausalLM._from_config(sinks, attn_implementation=NAME).eval()(**ids)
    with pytest.raises(UnsupportedModelError, match=r"no dropout of attention here .*model.eval\(\)"):
        decoder("llama", NAME, attention_dropout=0.1).train()(**ids)

"""Hybrid attention by name in plain decoders of transformers, against eager attention with a mask for every head."""

from contextlib import contextmanager

import pytest
import torch
from hybrid_witness import keep_half_of_the_heads, written_out
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from wrapped import fresh, model_inputs, wrapped

from hooked_mllm import HeadSet, HybridAttention, register_hybrid_attention
from hooked_mllm.attention.routing import PerLayer, QueryAwareHeads, Total
from hooked_mllm.errors import HeadError, HookValueError, InputError, UnsupportedModelError

NAME, SINK, WINDOW, HEADS, LAYERS = "test_hybrid", 2, 5, 4, 3
DENSE = {1: (2,), 2: (0, 1, 3)}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CLASSES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
}


def decoder(kind, attn="eager", **more):
    model_class, config_class, own = CLASSES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**{**SIZES, **own, **more})
        return model_class._from_config(config, attn_implementation=attn).eval().requires_grad_(False)


def hidden(model, start, dense=DENSE):
    """Within it, `model`, of eager attention, is the witness."""
    return written_out([block.self_attn for block in model.model.layers], dense, start, SINK, WINDOW)


def prompts(batch=2, n=23, side="left"):
    ids = torch.randint(1, 96, (batch, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for b in range(1, batch):
        hidden = slice(0, 4 * b) if side == "left" else slice(n - 4 * b, n)
        mask[b, hidden] = ids[b, hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}, tuple(mask.argmax(1).tolist())


def register(heads=None, **more):
    register_hybrid_attention(
        NAME, DENSE if heads is None else heads, **{"sink": SINK, "window": WINDOW, "implementation": "naive", **more}
    )


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


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
            return {"policy": "as told"}

    pairs = [(layer, head) for layer, heads in DENSE.items() for head in heads]
    names = [f"L{layer}H{head}" for layer, head in pairs]
    for heads in (DENSE, pairs, names, ", ".join(names), HeadSet(pairs, n_layers=LAYERS, n_heads=HEADS), Policy()):
        register(heads)  # a name may be registered again: the model runs what it stands for now
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
def test_a_4d_mask_is_taken_if_it_is_causal_and_refused_if_not():
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


# -- compiled and differentiated ---------------------------------------------------------------------------------------


@contextmanager
def layers_as_inputs():
    before = torch._dynamo.config.allow_unspec_int_on_nn_module
    torch._dynamo.reset()
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    try:
        yield
    finally:
        torch._dynamo.config.allow_unspec_int_on_nn_module = before
        torch._dynamo.reset()


@pytest.mark.filterwarnings("default")  # what torch's compiler says of itself
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_blocks_share_their_graphs_and_have_the_gradients_of_plain_ones(padded):
    register()
    model, n, graphs = decoder("qwen3", NAME, num_hidden_layers=4), 23, []
    x = torch.randn(2, n, 32, generator=torch.Generator().manual_seed(0))
    mask = prompts()[0]["attention_mask"].bool() if padded else None
    where = {"position_embeddings": model.model.rotary_emb(x, torch.arange(n)[None]), "attention_mask": mask}

    def count(graph, _):
        graphs.append(graph)
        return graph

    with layers_as_inputs(), torch.no_grad():
        for layer in model.model.layers:
            assert torch.equal(torch.compile(layer, backend=count, fullgraph=True)(x, **where), layer(x, **where))
    assert len(graphs) == 2  # of a number, and of numbers that change
    gradients = []
    with layers_as_inputs():
        layer = model.model.layers[2]
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            leaf = x.clone().requires_grad_(True)
            run(leaf, **where).square().sum().backward()
            gradients.append(leaf.grad)
    close(gradients[0], gradients[1])


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_whole_model_compiled(padded):
    register()
    inputs, _ = prompts(2 if padded else 1)
    model = decoder("llama", NAME)
    expected = model(**inputs).logits
    with layers_as_inputs():
        compiled = torch.compile(model, backend="eager")
        close(compiled(**inputs, use_cache=False).logits, expected)
        if not padded:
            close(compiled(inputs["input_ids"], use_cache=False).logits, expected)


def losses(model, *prompts):
    model.zero_grad()
    sum(model(x, labels=x, use_cache=False).loss for x in prompts).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", CLASSES)
def test_training_under_autocast(kind):
    """Rotary encoding leaves q and k in float32 there, and v is not."""
    register({layer: range(4) for layer in range(LAYERS)})  # all heads dense: the model's own attention
    inputs = prompts(1)[0]["input_ids"]
    found = []
    for attention in ("sdpa", NAME):
        model = decoder(kind, attention).requires_grad_(True).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(losses(model, inputs))
    assert (found[0] - found[1]).norm() < 0.03 * found[0].norm()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
def test_a_policy_in_a_block_that_a_backward_pass_runs_anew():
    """Two prompts, one backward pass: what a policy noted of the first is gone when it is run anew."""
    first, second = (torch.randint(1, 96, (1, n), generator=torch.Generator().manual_seed(n)) for n in (30, 45))
    policy = QueryAwareHeads(PerLayer(2), queries=4)
    register(policy)
    model = decoder("qwen3", NAME).requires_grad_(True).train()
    plain = losses(model, first, second)
    chosen = policy.chosen
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert len(chosen) == LAYERS and torch.equal(losses(model, first, second), plain) and policy.chosen == chosen
    register(QueryAwareHeads(Total(5), queries=4))
    with pytest.raises(UnsupportedModelError, match=r"backward pass runs attention anew.*Total.*PerLayer"):
        losses(model, first, second)
    register(QueryAwareHeads(Total(5), queries=4))
    model.gradient_checkpointing_disable()
    assert losses(model, first).isfinite().all()


# -- refused -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_heads_of_another_model_are_refused_when_it_first_runs():
    inputs, _ = prompts()
    model = decoder("qwen3", NAME)
    for heads, message in (
        (["L3H0"], "Layer 3 of head L3H0 is not there"),
        ([(0, 4)], "Head 4 of L0H4 is not there"),
        (HeadSet(["L0H0"], n_layers=36, n_heads=32), "model of 36 layers x 32 heads; this one has 3 x 4.*'sdpa'"),
    ):
        register(heads)
        with pytest.raises(HeadError, match=message):
            model(**inputs)


@pytest.mark.filterwarnings("default")  # what torch's compiler says of itself
@torch.no_grad()
def test_heads_of_another_model_are_refused_in_compiled_code_too():
    inputs, _ = prompts(1)
    model = decoder("qwen3", NAME)
    run = torch.compile(lambda: model(**inputs, use_cache=False).logits, backend="eager", fullgraph=True)
    register()
    run()
    register(["L3H0"])
    with pytest.raises(HeadError, match="Layer 3 of head L3H0 is not there"):
        run()


@torch.no_grad()
def test_a_part_of_the_heads_is_refused():
    inputs, _ = prompts()
    model = decoder("llama", NAME)
    register(["L0H1"])
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
def test_models_with_more_to_their_attention_are_refused():
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


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


WIDE = {"head_dim": 64, "hidden_size": 64}


def model_on_gpu(dtype, implementation):
    register(implementation=implementation)
    return decoder("qwen3", NAME, **WIDE).to("cuda", dtype)


def on_gpu(dtype, implementation, inputs):
    model = model_on_gpu(dtype, implementation)
    return model(**{name: value.cuda() for name, value in inputs.items()}).logits.float().cpu()


def block_on_gpu(dtype, implementation, compiled=False):
    model = model_on_gpu(dtype, implementation).model
    block = torch.compile(model.layers[1], fullgraph=True) if compiled else model.layers[1]
    x = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    where = model.rotary_emb(x, torch.arange(300, device="cuda")[None])
    return block(x, position_embeddings=where, attention_mask=None).float()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@needs_gpu
@torch.inference_mode()
def test_on_a_gpu_the_kernel_is_as_close_to_float32_as_the_definition(dtype, side):
    inputs, _ = prompts(3, 777, side)
    real = inputs["attention_mask"].bool()
    exact = on_gpu(torch.float32, "naive", inputs)[real]
    kernel, definition = ((on_gpu(dtype, how, inputs)[real] - exact).norm() for how in ("auto", "naive"))
    assert 0 < kernel < 1.2 * definition < 0.2 * exact.norm()


@needs_gpu
@pytest.mark.filterwarnings("default")
@torch.inference_mode()
def test_on_a_gpu_a_compiled_block_is_the_block():
    exact = block_on_gpu(torch.float32, "naive")
    compiled, plain = ((block_on_gpu(torch.bfloat16, "auto", way) - exact).norm() for way in (True, False))
    assert 0 < compiled < 1.2 * plain < 0.05 * exact.norm()


@needs_gpu
@torch.inference_mode()
def test_on_a_gpu_a_padded_batch_has_no_mask_of_n_by_n():
    n = 8192
    inputs, _ = prompts(2, n)
    register(implementation="triton")
    model = decoder("qwen3", NAME, **WIDE, max_position_embeddings=n).to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in inputs.items()}
    for _ in range(2):  # the first run compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.model(**inputs, use_cache=False)
    assert torch.cuda.max_memory_allocated() - before < n * n  # a boolean mask would be twice that

"""Hybrid attention as a backend, against hybrid attention written out in an unwrapped model."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from helpers import toy_witness
from helpers.hybrid_witness import DENSE, SINK, WINDOW, HybridReference, written_out
from helpers.tiny import FAMILIES
from helpers.wrapped import edit, model_inputs, noise, plain, wrapped
from hooked_mllm import (
    ActivationCache,
    AttentionKnockout,
    GenerationCache,
    HeadAblation,
    HeadPatch,
    HeadSet,
    HookedMLLM,
    HybridAttention,
    SampleBatch,
    toys,
)

POINTS = ["rot_q", "rot_k", "v", "attn_scores", "pattern", "z"]


def hybrid(dense=None, sink=SINK, window=WINDOW):
    dense = HeadSet([(l, h) for l, hs in DENSE.items() for h in hs], n_layers=3, n_heads=4) if dense is None else dense
    return HybridAttention(dense, sink=sink, window=window, implementation="naive")


@pytest.fixture(scope="module")
def references():
    return {family: HybridReference(family) for family in FAMILIES}


def close(a, b, atol=2e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


# -- the forward pass --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "side"), [(1, "left"), (2, "left"), (2, "right")])
@torch.no_grad()
def test_logits_of_a_prompt(family, batch, side, references):
    inputs, model = model_inputs(family, 1, batch, False, side), wrapped(family)
    real = inputs["attention_mask"].bool()
    expected = references[family].on(inputs)(inputs, {})[real]
    with model.attention(hybrid()):
        got = model(inputs)[real]
    close(got, expected)
    assert (got - plain(family)(**inputs).logits[real]).abs().max() > 0.05
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


@torch.no_grad()
def test_a_prompt_read_in_chunks_against_a_cache(references):
    for family, side in (("internvl", "left"), ("llava_onevision", "right")):
        inputs, model = model_inputs(family, 0, 2, False, side), wrapped(family)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cut, reference = ids.shape[1] // 2, references[family].on(inputs)
        pasts = DynamicCache(), DynamicCache()
        for part in (slice(0, cut), slice(cut, None)):
            step = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop]}
            with reference.patched():
                expected = reference.model(**step, past_key_values=pasts[0], use_cache=True).logits
            with model.attention(hybrid()):
                got = model({**step, "past_key_values": pasts[1]}, use_cache=True)
            real = mask[:, part].bool()
            close(got[real], expected[real])


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_the_room_left_in_a_static_cache_is_not_seen(batch, references):
    family = "internvl"
    inputs, model = model_inputs(family, 1, batch), wrapped(family)
    expected = references[family].on(inputs)(inputs, {})
    length = inputs["input_ids"].shape[1]
    past = StaticCache(model.hf_model.config.text_config, max_cache_len=length + 7)
    with model.attention(hybrid()):
        got, cache = model.run_with_cache({**inputs, "past_key_values": past}, names_filter="*hook_pattern")
    real = inputs["attention_mask"].bool()
    close(got[real], expected[real])
    seen = references[family].seen[references[family].module("text", 2), "pattern"]
    for entry in (cache["pattern", 2], cache.entry("blocks.2.attn.hook_pattern").samples(slice(None)).tensor()):
        close(entry[..., :length].transpose(1, 2)[real], seen.transpose(1, 2)[real])
        assert (entry[..., length:].transpose(1, 2)[real] == 0).all()


@torch.no_grad()
def test_generation_is_hybrid_in_the_prompt_and_dense_behind_it(family, references):
    inputs, model = model_inputs(family, 1, 2), wrapped(family)
    reference = references[family].on(inputs)
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with reference.patched():
        expected = reference.model.generate(**inputs, **options)
    with model.attention(hybrid()):
        got, cache = model.run_with_cache(inputs, names_filter="*hook_pattern", generate=options)
        again = model.generate(inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(got.sequences, expected.sequences) and torch.equal(again, expected.sequences)
    close(torch.stack(got.logits), torch.stack(expected.logits))
    for layer, dense in enumerate([(), *DENSE.values()]):
        last = cache.steps[-1]["pattern", layer]  # the last step, as the reference saw it
        close(last, reference.seen[reference.module("text", layer), "pattern"])
        far = [h for h in range(4) if h not in dense]
        for b, first in enumerate(reference.start):
            between = slice(first + SINK, inputs["input_ids"].shape[1] - WINDOW)
            assert (cache.steps[0]["pattern", layer][b, far, -1, between] == 0).all()
            assert (last[b, :, 0, between] > 0).all()


@torch.no_grad()
def test_where_all_heads_are_dense_or_one_token_is_read_the_models_own_attention_runs_bit_for_bit(family):
    inputs, model = model_inputs(family, 1, 2), wrapped(family)
    everything = HeadSet([(l, h) for l in range(3) for h in range(4)], n_layers=3, n_heads=4)
    own = plain(family)
    with model.attention(hybrid(everything)):
        assert torch.equal(model(inputs), own(**inputs).logits)
    with model.attention("eager"):
        eager = model(inputs)
        with model.attention(hybrid(everything)):
            assert torch.equal(model(inputs), eager)
    one = {"input_ids": inputs["input_ids"][:1, -1:], "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    with model.attention(hybrid()):
        assert torch.equal(model(one), own(**one).logits)


@torch.no_grad()
def test_no_mask_of_n_by_n_is_made(family):
    model, seen = wrapped(family), []
    for batch in (1, 2):
        inputs = model_inputs(family, 1, batch)
        with model.attention(hybrid()):
            attention = model.hf_model.get_submodule(model.family.text.blocks)[1].self_attn
            hook = attention.register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
            )
            model(inputs)
            hook.remove()
    assert seen[0] is None
    assert seen[1].shape == inputs["attention_mask"].shape and torch.equal(seen[1], inputs["attention_mask"].bool())


@pytest.fixture(scope="module")
def toy():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", check=False)


@pytest.mark.parametrize("heads", [["L2H4", "L2H5", "L2H6", "L2H7"], []], ids=["retrieval heads", "none"])
@torch.no_grad()
def test_a_trained_toy_finds_the_answer_if_its_retrieval_heads_are_dense(toy, heads):
    task = toys.VisualRetrieval(pages=4)
    inputs = toy_witness.inputs([task.example(i) for i in range(6)])
    reference, dense = toy_witness.model(attention="eager"), HybridAttention(heads).policy.by_layer
    start = tuple(inputs["attention_mask"].argmax(1).tolist())
    modules = [block.self_attn for block in reference.model.language_model.layers]
    with written_out(modules, dense, start, 4, 16):
        expected = reference(**inputs).logits
        tokens = reference.generate(**inputs, max_new_tokens=2, do_sample=False)
    with toy.attention(HybridAttention(heads, sink=4, window=16, implementation="naive")):
        got = toy(inputs)
        assert torch.equal(toy.generate(inputs, max_new_tokens=2, do_sample=False), tokens)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-3, rtol=1e-3)
    answers = toy.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1]][:, None])
    right = sum(answer == task.example(i).answer for i, answer in enumerate(answers))
    assert right == 6 if heads else right < 3


# -- everything that reads or edits attention --------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
@torch.no_grad()
def test_every_edit_reaches_the_logits_as_in_the_reference(family, point, references):
    inputs, full = model_inputs(family, 1, 2), f"blocks.1.attn.hook_{point}"
    change, real = edit(full), inputs["attention_mask"].bool()
    if point == "pattern":  # padding stays unseen
        change = lambda x: x * (1 + 0.5 * noise(x))  # noqa: E731
    reference, model = references[family].on(inputs), wrapped(family)
    expected = reference(inputs, {("text", 1, point): change})
    with model.attention(hybrid()):
        got = model.run_with_hooks(inputs, fwd_hooks=[(full, lambda x, hook: change(x))])
        base = model(inputs)
    assert (got - base)[real].abs().max() > 0.01
    close(got[real], expected[real], atol=5e-4)


@torch.no_grad()
def test_what_is_cached_is_what_the_reference_computed(family, references, tmp_path):
    inputs, model = model_inputs(family, 1, 2), wrapped(family)
    reference, real = references[family].on(inputs), inputs["attention_mask"].bool()
    expected = reference(inputs, {})
    with model.attention(hybrid()):
        logits, cache = model.run_with_cache(inputs)
        _, rows = model.run_with_cache(inputs, names_filter="*hook_pattern", queries="last", keys=[3, 8, 9])
        assert torch.equal(model(inputs), logits)
    close(logits[real], expected[real])
    cache.save(tmp_path / "cache.safetensors")
    read = ActivationCache.load(tmp_path / "cache.safetensors")
    for layer in range(3):
        seen = {p: reference.seen[reference.module("text", layer), p] for p in (*POINTS, "pattern")}
        for each in (cache, read):
            for p in ("rot_q", "rot_k", "v", "z"):
                close(each[p, layer][real], seen[p][real])
            close(each["pattern", layer].transpose(1, 2)[real], seen["pattern"].transpose(1, 2)[real])
            visible = (seen["attn_scores"] > -1e30).transpose(1, 2)[real]
            scores = each["attn_scores", layer].transpose(1, 2)[real]
            assert torch.equal(scores > -1e30, visible)
            close(scores[visible], seen["attn_scores"].transpose(1, 2)[real][visible])
        close(rows["pattern", layer][:, :, 0], seen["pattern"][:, :, -1, [3, 8, 9]])
        lazy = cache.entry(f"blocks.{layer}.attn.hook_pattern")
        close(lazy.samples(slice(1, 2)).to("cpu").tensor()[0, :, -1], seen["pattern"][1, :, -1])
        close(cache.pattern(layer, queries="last")[:, :, 0], seen["pattern"][:, :, -1])


@torch.no_grad()
def test_a_generation_is_written_and_read_with_its_two_kinds_of_steps(tmp_path):
    inputs, model = model_inputs("internvl", 1, 2), wrapped("internvl")
    with model.attention(hybrid()):
        _, cache = model.run_with_cache(
            inputs, names_filter="*hook_pattern", generate={"max_new_tokens": 3, "do_sample": False}
        )
    cache.save(tmp_path / "steps.safetensors")
    read = GenerationCache.load(tmp_path / "steps.safetensors")
    assert len(read) == len(cache) == 3
    for layer in range(3):
        assert torch.equal(read["pattern", layer], cache["pattern", layer])
        assert torch.equal(read.steps[2]["pattern", layer], cache.steps[2]["pattern", layer])


@torch.no_grad()
def test_a_cache_file_of_the_first_format_is_read(tmp_path):
    inputs, model = model_inputs("internvl", 1, 2), wrapped("internvl")
    _, cache = model.run_with_cache(inputs, names_filter="*hook_pattern")
    cache.save(tmp_path / "now.safetensors")
    tensors = load_file(tmp_path / "now.safetensors")
    with safe_open(tmp_path / "now.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["hooked_mllm"])
    header["format"] = "hooked_mllm.ActivationCache/1"
    del header["digest"]  # files of that format had none
    for entry in header["steps"][0]["entries"].values():
        for new in ("streaming", "q_offset"):
            entry.pop(new, None)
    save_file(tensors, tmp_path / "then.safetensors", metadata={"hooked_mllm": json.dumps(header)})
    with pytest.warns(UserWarning, match="no digest"):
        read = ActivationCache.load(tmp_path / "then.safetensors")
    assert all(torch.equal(read[name], cache[name]) for name in cache)


def test_gradients_are_those_of_the_reference(family, references):
    inputs, model = model_inputs(family, 1, 2), wrapped(family)
    reference, weight = references[family].on(inputs), None
    edits = {}

    def watch(name):
        def change(x):
            edits[name] = x.detach().requires_grad_(True)
            return edits[name]

        return change

    def scalar(logits):
        nonlocal weight
        weight = noise(logits[:, -1]) if weight is None else weight
        return (logits[:, -1] * weight).sum()

    names = ["rot_q", "rot_k", "v", "z"]
    with model.attention(hybrid()):
        _, cache = model.run_with_cache(
            inputs, names_filter=[f"blocks.0.attn.hook_{n}" for n in names], incl_bwd=scalar
        )
    for name in names:
        scalar(reference(inputs, {("text", 0, name): watch(name)})).backward()
        close(cache[f"blocks.0.attn.hook_{name}_grad"], edits[name].grad)


@torch.no_grad()
def test_ablation_knockout_and_patching_under_it(family, references):
    inputs, model = model_inputs(family), wrapped(family)
    reference, other = references[family].on(inputs), dict(inputs)
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][0, -3] += 1
    reference(other, {})
    source = reference.seen[reference.module("text", 1), "z"]

    def patched(z):
        z = z.clone()
        z[:, :, 3] = source[:, :, 3]
        return z

    def without(z):
        z = z.clone()
        z[:, :, 2] = 0
        return z

    def blind(scores):
        scores = scores.clone()
        scores[:, 1, -3:, 1] = torch.finfo(scores.dtype).min
        return scores

    with model.attention(hybrid()):
        with model.intervene(HeadAblation(["L1H2"], mode="zero", phase="both")):
            ablated = model(inputs)
        with model.intervene(AttentionKnockout(["L0H1"], queries=slice(-3, None), keys=[1], phase="both")):
            knocked_out = model(inputs)
        _, cache = model.run_with_cache(other)
        with model.intervene(HeadPatch(["L1H3"], cache)):
            replaced = model(inputs)
    close(ablated, reference(inputs, {("text", 1, "z"): without}))
    close(knocked_out, reference(inputs, {("text", 0, "attn_scores"): blind}))
    close(replaced, reference(inputs, {("text", 1, "z"): patched}))
    assert (replaced - reference(inputs, {})).abs().max() > 0.01


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_on_a_gpu_the_kernel_gives_the_toy_the_logits_of_the_definition(side):
    toy = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="bfloat16", device="cuda", check=False)
    task = toys.VisualRetrieval(pages=3)
    pair = SampleBatch.collate(task.samples(toy, 3), padding_side=side)
    real, results, patterns = ~pair.mask("padding"), {}, {}
    for how in ("triton", "naive"):
        with toy.attention(HybridAttention(["L2H4", "L2H6"], sink=4, window=16, implementation=how)):
            logits, cache = toy.run_with_cache(pair, names_filter="*hook_pattern")
            results[how], patterns[how] = logits.float().cpu()[real], cache["pattern", 2].cpu()
            assert torch.equal(toy(pair), logits)
            toy.check()
    exact = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", device="cuda", check=False)
    with exact.attention(HybridAttention(["L2H4", "L2H6"], sink=4, window=16, implementation="naive")):
        expected = exact(pair).cpu()[real]
    kernel, definition = ((results[how] - expected).norm() for how in ("triton", "naive"))
    assert 0 < kernel < 1.3 * definition < 0.2 * expected.norm()
    torch.testing.assert_close(patterns["triton"], patterns["naive"], atol=0.1, rtol=0)

"""Runs: threads and nested runs do not see each other; compiled code is bypassed; a hook that is missed raises."""

import re
import threading

import pytest
import torch
from transformers import DynamicCache

from helpers.wrapped import fresh, model_inputs, plain, wrapped
from hooked_mllm import HeadAblation, HookedMLLM, HybridAttention
from hooked_mllm.errors import HookValueError

FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")
NAME = "blocks.1.attn.hook_z"
NAMES = (NAME, "blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern", "vision.blocks.0.attn.hook_z")


def zero(z, hook):
    return z * 0


def text(length: int) -> torch.Tensor:
    """Tokens of a prompt without images."""
    return torch.randint(10, 40, (1, length), generator=torch.Generator().manual_seed(length))


def blocks(model: HookedMLLM) -> torch.nn.ModuleList:
    return model.hf_model.get_submodule(model.family.text.blocks)


@pytest.mark.parametrize("family", FAMILIES)
def test_threads_cache_their_own_runs(family):
    model = wrapped(family)
    inputs = [model_inputs(family), {"input_ids": text(23)}]
    expected = [model.run_with_cache(i)[1] for i in inputs]
    wrong = []

    def work(turn):
        for k in (turn, 1 - turn, turn):
            with model.hooks([(NAME, lambda z, hook: None)]):
                _, cache = model.run_with_cache(inputs[k])
            names = [n for n in NAMES if n in expected[k]]
            wrong.extend(n for n in names if not torch.equal(cache[n], expected[k][n]))

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_is_active_in_its_thread_alone(family):
    model, inputs = wrapped(family), model_inputs(family)
    expected, seen = model(inputs), []
    edited = model.run_with_hooks(inputs, fwd_hooks=[(NAME, zero)])
    with model.hooks([(NAME, zero)]), model.attention("eager"):
        thread = threading.Thread(target=lambda: seen.append(model(inputs)))
        thread.start()
        thread.join()
        assert not torch.equal(model(inputs), expected)
    assert torch.equal(seen[0], expected) and not torch.equal(edited, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_inside_of_a_run_leaves_the_outer_cache_and_steps_alone(family):
    model, inputs, other = wrapped(family), model_inputs(family), {"input_ids": text(11)}
    logits, expected = model.run_with_cache(inputs)
    generated = model.generate(inputs, max_new_tokens=3, do_sample=False)
    inner, steps, depth = [], [], []

    def nested(x, hook):
        if depth:  # this hook is active in the inner runs, too
            return
        steps.append(hook.step)
        depth.append(1)
        inner.append(model.run_with_cache(other)[1][NAME])
        model.generate(other, max_new_tokens=2, do_sample=False)
        depth.clear()

    expected_inner = model.run_with_cache(other)[1][NAME]
    with model.hooks([("blocks.0.hook_resid_post", nested)]):
        again, cache = model.run_with_cache(inputs)
        assert torch.equal(again, logits) and torch.equal(cache[NAME], expected[NAME])
        assert torch.equal(model.generate(inputs, max_new_tokens=3, do_sample=False), generated)
    assert steps == [0, 0, 1, 2] and all(torch.equal(z, expected_inner) for z in inner)


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_and_backends_act_in_compiled_blocks(family):
    model = HookedMLLM.from_model(fresh(family), check=False)
    inputs = model_inputs(family)
    backend = HybridAttention([(0, 0)], sink=1, window=2)

    def results():
        with model.attention(backend):
            hybrid = model(inputs)
        return model.run_with_hooks(inputs, fwd_hooks=[(NAME, zero)]), model.run_with_cache(inputs)[1][NAME], hybrid

    expected = results()
    for block in blocks(model):
        block.compile(backend="eager")
    model(inputs)
    for result, value in zip(results(), expected, strict=True):
        assert torch.equal(result, value)
    torch.compiler.reset()


def test_a_hook_that_the_run_misses_raises():
    model = HookedMLLM.from_model(fresh("internvl"), check=False)
    inputs = model_inputs("internvl")
    with model.hooks([("blocks.1.hook_mlp_out", zero)]):
        blocks(model)[1].mlp._forward_hooks.clear()
        with pytest.raises(HookValueError, match=r"did not call the hooks on blocks\.1\.hook_mlp_out"):
            model(inputs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_a_chunked_prefill_is_edited_as_a_whole_one(family, phase):
    model, inputs = wrapped(family), {"input_ids": text(23)}
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ablation = HeadAblation([(0, 1), (1, 2)], mode="scale", factor=3.0, phase=phase)
    with model.intervene(ablation) as records:
        whole = model.generate(inputs, **options)
    try:
        plain(family).generate(**inputs, prefill_chunk_size=11, **options)
    except RuntimeError as error:  # transformers 5.17 cannot cut the positions of Qwen3-VL
        with pytest.raises(RuntimeError, match=re.escape(str(error)[:40])), model.intervene(ablation):
            model.generate(inputs, prefill_chunk_size=11, **options)
        return
    with model.intervene(ablation):
        chunked = model.generate(inputs, prefill_chunk_size=11, **options)
    assert records[0]["applied"]["prefill" if phase == "prefill" else "decode"]
    for a, b in zip(whole.logits, chunked.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loop_over_chunks_is_edited_as_the_whole_prompt(family):
    model, tokens = wrapped(family), text(22)
    ablation = HeadAblation([(0, 1), (1, 2)], mode="zero", phase="prefill", positions=[3, 11, -1])
    with model.intervene(ablation):
        expected = model({"input_ids": tokens})
        past, logits = DynamicCache(config=model.hf_model.config.get_text_config()), []
        for first in range(0, 22, 7):  # the last chunk is one token
            chunk = {"input_ids": tokens[:, first : first + 7], "past_key_values": past, "use_cache": True}
            logits.append(model(chunk, prompt_length=22))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)

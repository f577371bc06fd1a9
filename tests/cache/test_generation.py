"""A cache of a generation: each step is what a plain step-by-step run computes, and together they are one sequence."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from helpers.cache_witness import batch, close, film, hooked, plain, sample, text_sample
from helpers.tiny import tiny_model
from hooked_mllm import HookedMLLM
from hooked_mllm.cache import GenerationCache
from hooked_mllm.cache.lazy import GrowingKeys, LazyPattern
from hooked_mllm.errors import CacheFileError, HookNameError, HookValueError, InputError

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
PLAIN = ("blocks.*", "hook_embed", "ln_final*", "hook_logits")


def same(a, b) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-5, msg=name)


def generated(family, make=sample, names=PLAIN, **options):
    tokens, cache = hooked(family).run_with_cache(make(family), names, generate={**GREEDY, **options})
    return tokens, cache


def whole(family, make, tokens):
    """One plain forward over the finished sequence, with the positions that the prompt's padding gives."""
    inputs = dict(make(family).inputs)
    new = tokens.shape[1] - 1 - inputs["input_ids"].shape[1]
    inputs["input_ids"] = tokens[:, :-1]
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(len(tokens), new, dtype=torch.long)], 1)
    if family != "qwen3_vl":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(len(tokens), new)], 1)
    return inputs


@pytest.mark.parametrize("make", [sample, batch, film, text_sample])
def test_tokens_are_those_of_the_plain_model(family, make):
    tokens, cache = generated(family, make)
    expected = plain(family, "sdpa").generate(**make(family).inputs, **GREEDY)
    assert torch.equal(tokens, expected)
    assert len(cache) == len(cache.steps) == 5 and all("hook_embed" in step for step in cache)


@pytest.mark.parametrize("make", [sample, film])
def test_each_step_is_what_an_incremental_run_computes(family, make):
    tokens, cache = generated(family, make)
    hf_model, inputs = plain(family), make(family).inputs
    n = inputs["input_ids"].shape[1]
    past, seen = DynamicCache(), []
    with torch.no_grad():
        for step in range(5):
            z = []
            hooks = [
                layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, z=z: z.append(args[0]))
                for layer in hf_model.model.language_model.layers
            ]
            arguments = inputs if step == 0 else {"input_ids": tokens[:, n + step - 1 : n + step]}
            if family != "qwen3_vl" and step:
                arguments = {**arguments, "position_ids": torch.tensor([[n + step - 1]])}
            output = hf_model(**arguments, past_key_values=past, use_cache=True, output_attentions=True)
            for hook in hooks:
                hook.remove()
            seen.append((z, output))
    for step, (z, output) in enumerate(seen):
        for layer in range(3):
            close(cache.steps[step]["z", layer].flatten(2), z[layer], 1e-4)
            close(cache.steps[step]["pattern", layer], output.attentions[layer], 1e-4)
            k = past.layers[layer].keys[:, :, : n + step]
            close(cache.steps[step]["rot_k", layer], k.transpose(1, 2), 1e-4)
        close(cache.steps[step]["logits"][:, -1], output.logits[:, -1], 1e-3)


@pytest.mark.parametrize("make", [sample, batch, film, text_sample])
def test_joined_it_is_one_forward_over_the_whole_sequence(family, make):
    tokens, cache = generated(family, make)
    _, once = hooked(family).run_with_cache(whole(family, make, tokens), list(PLAIN))
    real = ~make(family).mask("padding")
    real = torch.cat([real, torch.ones(len(real), 4, dtype=torch.bool)], 1)
    for layer in range(3):
        for name in ("z", "resid_post", "rot_q", "rot_k", "mlp_out"):
            close(cache[name, layer][real], once[name, layer][real], 1e-4)
        for b, row in enumerate(real):
            close(cache["pattern", layer][b][:, row], once["pattern", layer][b][:, row], 1e-4)
            joined, scores = cache["attn_scores", layer][b][:, row], once["attn_scores", layer][b][:, row]
            torch.testing.assert_close(joined, scores, atol=1e-4, rtol=1e-4)
    assert cache["pattern", 0].shape[2:] == (tokens.shape[1] - 1,) * 2
    assert "hook_embed" in cache and ("z", 9) not in cache
    with pytest.raises(HookNameError):
        cache["blocks.0.hook_nothing"]


def test_rows_and_columns_kept(family):
    _, full = generated(family)
    inputs = sample(family)
    question, visual = inputs.mask("question")[0], inputs.mask("visual")[0]
    _, cache = generated(family, names="blocks.*hook_pattern", make=lambda f: inputs)
    _, rows = hooked(family).run_with_cache(
        inputs, "blocks.*hook_pattern", generate=GREEDY, queries="question", keys="visual"
    )
    close(rows.steps[0]["pattern", 1], full.steps[0]["pattern", 1][:, :, question][..., visual])
    close(rows.steps[0].pattern(1, "question", "visual"), rows.steps[0]["pattern", 1])
    for step in range(1, 5):
        close(rows.steps[step]["pattern", 1], full.steps[step]["pattern", 1][..., : len(inputs)][..., visual])
        close(
            cache.steps[step].pattern(1, queries=0, keys="visual" if step == 0 else [2, 4]),
            full.steps[step]["pattern", 1][..., [2, 4]],
        )
    joined = rows["pattern", 1]
    assert joined.shape[2:] == (question.sum() + 4, visual.sum())


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    held = {}
    for n in (8, 16, 32):
        options = {**GREEDY, "max_new_tokens": n, "min_new_tokens": n}
        _, cache = hooked("qwen3_vl").run_with_cache(
            text_sample("qwen3_vl"), ["blocks.*hook_pattern", "blocks.*hook_rot_k"], generate=options
        )
        held[n] = cache.nbytes
        cache["rot_k", 0], cache["pattern", 0]
        assert cache.nbytes == held[n]
    assert held[32] - held[16] == 2 * (held[16] - held[8])


def test_edits_in_a_step_are_what_is_cached(family):
    n = len(sample(family))

    def uniform(pattern, hook):
        if hook.step == 2:
            pattern[:, 1] = 1 / pattern.shape[-1]

    with hooked(family).hooks([("blocks.1.attn.hook_pattern", uniform)]):
        _, cache = generated(family)
    _, before = generated(family)
    close(cache.steps[2]["pattern", 1][:, 1], torch.full((1, 1, n + 2), 1 / (n + 2)))
    close(cache.steps[1]["pattern", 1], before.steps[1]["pattern", 1])
    close(cache["pattern", 1][:, 0, :n], before["pattern", 1][:, 0, :n])

    def shifted(k, hook):
        k[:] += 1

    with hooked(family).hooks([("blocks.1.attn.hook_rot_k", shifted)]):
        _, cache = generated(family, names="blocks.1.attn.*")
    v, pattern = cache.steps[3]["v", 1], cache.steps[3]["pattern", 1]
    scores = torch.einsum(
        "bqhd,bkhd->bhqk", cache.steps[3]["rot_q", 1], cache.steps[3]["rot_k", 1].repeat_interleave(2, 2)
    )
    close(pattern, (scores * 8**-0.5).softmax(-1), 1e-4)
    assert v.shape[1] == 1


# -- generations whose keys do not simply grow -----------------------------------------------------------------------


def z_of_pattern(cache, step, layer, values):
    pattern = cache.steps[step]["pattern", layer]
    return torch.einsum("bhqk,bkhd->bqhd", pattern[..., : values.shape[1]], values.repeat_interleave(2, dim=2))


@pytest.mark.parametrize("how", ["argument", "config", "model"])
def test_beams_change_places_and_their_patterns_are_their_own(family, how):
    model, options = hooked(family), dict(GREEDY)
    if how == "argument":
        options["num_beams"] = 3
    elif how == "config":
        options = {"generation_config": GenerationConfig(num_beams=3, eos_token_id=2, pad_token_id=0, **GREEDY)}
    else:
        model.hf_model.generation_config.num_beams = 3
    try:
        calls: list[torch.Tensor] = []
        site = model.wiring.text[1]
        site.add_tap(lambda call: calls.append(call.v.clone()))
        tokens, cache = model.run_with_cache(sample(family), ["blocks.1.*", "hook_logits"], generate=options)
    finally:
        model.hf_model.generation_config.num_beams = None
        for tap in tuple(site.taps):
            site.remove_tap(tap)
    assert tokens.shape[0] == 1 and cache["z", 1].shape[0] == 3
    for step in range(len(cache)):
        close(z_of_pattern(cache, step, 1, calls[step].transpose(1, 2)), cache.steps[step]["z", 1], 1e-4)


@pytest.mark.parametrize("make", [sample, batch])
def test_a_static_cache_gives_the_same_rows(family, make):
    tokens, cache = generated(family, make, names="blocks.*hook_pattern", cache_implementation="static")
    expected, other = generated(family, make, names="blocks.*hook_pattern")
    assert torch.equal(tokens, expected)
    n = other["pattern", 1].shape[-1]
    real = torch.cat([~make(family).mask("padding"), torch.ones(len(tokens), 4, dtype=torch.bool)], 1)
    for b, row in enumerate(real):
        close(cache["pattern", 1][b][:, row][..., :n], other["pattern", 1][b][:, row], 1e-4)
        assert not cache["pattern", 1][b][:, row][..., n:].any()


def test_attention_made_explicit_over_a_static_cache_is_the_same(family):
    with hooked(family).hooks([("blocks.1.attn.hook_pattern", lambda pattern, hook: pattern.clone())]):
        tokens, cache = generated(family, names="blocks.*hook_z", cache_implementation="static")
    expected, other = generated(family, names="blocks.*hook_z", cache_implementation="static")
    assert torch.equal(tokens, expected)
    close(cache["z", 2], other["z", 2], 1e-4)


def test_a_window_that_drops_keys_gives_the_rows_of_the_window():
    slid = tiny_model("llava_onevision")
    slid.config.text_config.sliding_window = 6
    slid.config.text_config.layer_types = ["full_attention", *["sliding_attention"] * 2]
    slid.model.language_model.has_sliding_layers = True
    for layer, block in enumerate(slid.model.language_model.layers):
        kind = "sliding_attention" if layer else "full_attention"
        block.attention_type, block.self_attn.sliding_window = kind, 6 if layer else None
    model = HookedMLLM.from_model(slid, check=False)
    ids = {"input_ids": torch.arange(200, 220)[None], "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    tokens, cache = model.run_with_cache(ids, "blocks.*", generate=GREEDY)
    _, once = model.run_with_cache({"input_ids": tokens[:, :-1]}, "blocks.*")
    for layer in range(3):
        close(cache["z", layer], once["z", layer], 1e-4)
        for step in range(1, 5):
            row = cache.steps[step]["pattern", layer]
            close(row[0, :, 0], once["pattern", layer][0, :, 19 + step, : 20 + step][:, -row.shape[-1] :], 1e-4)
            keys = [3, 17, 19 + step]  # the first is outside of the window
            close(cache.steps[step].pattern(layer, keys=keys), once.pattern(layer, [19 + step], keys), 1e-4)
        close(cache["pattern", layer], once["pattern", layer], 1e-4)
        close(cache.pattern(layer, [5, 22], [0, 4, 20]), once.pattern(layer, [5, 22], [0, 4, 20]), 1e-4)
    chunked = model.run_with_cache(ids, "blocks.*", generate={**GREEDY, "prefill_chunk_size": 7})[1]
    for name in cache.steps[0]:
        torch.testing.assert_close(chunked[name], cache[name], atol=1e-4, rtol=1e-3, msg=name)


def test_without_a_kv_cache_there_are_no_steps_to_keep():
    for options in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
        with pytest.raises(HookValueError, match="use_cache"):
            hooked("qwen3_vl").run_with_cache(text_sample("qwen3_vl"), generate={**GREEDY, **options})


def test_several_sequences_of_one_prompt(family):
    # transformers 5.17 deals InternVL's tiles out to the wrong sequences
    make = text_sample if family == "internvl" else sample
    torch.manual_seed(0)
    tokens, cache = generated(family, make, num_return_sequences=2, do_sample=True)
    for b in range(2):
        _, once = hooked(family).run_with_cache(whole(family, make, tokens[b : b + 1]), "blocks.*")
        close(cache["pattern", 2][[b]], once["pattern", 2], 1e-4)


# -- files -----------------------------------------------------------------------------------------------------------


def test_round_trip(family, tmp_path):
    for make, options in ((batch, {}), (sample, {"num_beams": 2}), (sample, {"cache_implementation": "static"})):
        _, cache = generated(family, make, ["blocks.0.*", "hook_logits"], **options)
        cache.save(tmp_path / "g")
        again = GenerationCache.load(tmp_path / "g", model=hooked(family))
        assert len(again) == len(cache) and list(tmp_path.iterdir()) == [tmp_path / "g"]
        for a, b in zip(again, cache, strict=True):
            same(a, b)
        close(again["pattern", 0], cache["pattern", 0])
        entry = again.steps[1].entry(("pattern", 0))
        assert isinstance(entry, LazyPattern) and isinstance(entry.k, GrowingKeys) is (not options)
        again.save(tmp_path / "again")
        assert (tmp_path / "again").stat().st_size == (tmp_path / "g").stat().st_size
        (tmp_path / "again").unlink()
    with pytest.raises(CacheFileError, match=r"GenerationCache\.load"):
        cache.steps[0].load(tmp_path / "g")
    cache.steps[0].save(tmp_path / "one")
    with pytest.raises(CacheFileError, match=r"ActivationCache\.load"):
        GenerationCache.load(tmp_path / "one")


def test_a_file_grows_with_the_tokens_and_not_with_their_square(tmp_path):
    held = {}
    for n in (8, 16, 32):
        options = {**GREEDY, "max_new_tokens": n, "min_new_tokens": n}
        _, cache = hooked("qwen3_vl").run_with_cache(text_sample("qwen3_vl"), "blocks.*hook_rot_k", generate=options)
        cache.save(tmp_path / "g")
        with open(tmp_path / "g", "rb") as file:  # noqa: PTH123
            header = int.from_bytes(file.read(8), "little")
        held[n] = (tmp_path / "g").stat().st_size - header
    assert held[32] - held[16] == 2 * (held[16] - held[8])


def test_repr():
    _, cache = generated("qwen3_vl")
    assert "prefill and 4 decoding steps" in repr(cache) and "blocks.*.attn.hook_pattern" in repr(cache)


def test_a_device_that_is_not_there_is_an_input_error(family):
    _, cache = generated(family, text_sample, "hook_embed")
    with pytest.raises(InputError, match="Expected a device of this machine"):
        cache.to("cuda:77")

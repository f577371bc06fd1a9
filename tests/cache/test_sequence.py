"""Positions and names mean positions of the sequence: of a part of a prompt behind a KV cache, and of every step."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from helpers.cache_witness import batch, close, hooked, sample
from helpers.wrapped import model_inputs, wrapped
from hooked_mllm import Box, HeadAblation, metrics, objectives
from hooked_mllm.cache import GenerationCache
from hooked_mllm.cache.sequence import Span
from hooked_mllm.errors import HookValueError, InputError, LayoutError

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


def text(length: int = 22) -> torch.Tensor:
    return torch.randint(10, 40, (1, length), generator=torch.Generator().manual_seed(length))


def kv_cache(model) -> DynamicCache:
    return DynamicCache(config=model.hf_model.config.get_text_config())


# -- spans -----------------------------------------------------------------------------------------------------------


def prompt_masks(kind):
    question = torch.tensor([[False, True, True, False]])
    return {"question": question, "padding": question & False, "visual": ~question, "last": question & False}[kind]


def test_positions_as_rows():
    prompt, part, step = Span(0, 4), Span(4, 8, known=4), Span(6, 7, generated=True)
    assert prompt.rows("question", 1, prompt_masks).tolist() == [[1, 2]]
    assert part.rows("question", 1, prompt_masks).tolist() == [[1, 2]]
    assert part.queries([4, -1], 1, prompt_masks).tolist() == [[4, 7]]
    assert part.rows(slice(2, 6), 1, prompt_masks).tolist() == [[0, 1]]  # a slice is cut to the rows
    assert part.keys([0, 5], 1, prompt_masks).tolist() == [[0, 5]]
    for same in (0, -1, 6, [6], slice(None), slice(0, 1), slice(-1, None), "last", torch.ones(1, 1).bool()):
        assert step.rows(same, 1, prompt_masks).tolist() == [[0]], same
    assert step.keys("question", 1, prompt_masks).tolist() == [[1, 2]]
    assert step.keys(torch.tensor([[True, False, False, True]]), 1, prompt_masks).tolist() == [[0, 3]]
    assert step.keys("question", 3, prompt_masks).tolist() == [[1, 2]] * 3  # beams


def test_positions_that_are_not_rows_are_rejected():
    part, step = Span(4, 8, known=4), Span(6, 7, generated=True)
    for wrong in (0, [3, 5], torch.arange(8) < 5):
        with pytest.raises(LayoutError, match="positions 4 to 7"):
            part.rows(wrong, 1, prompt_masks)
    for wrong in ("question", 3, torch.arange(4) < 2):
        with pytest.raises(LayoutError, match="positions 6 to 6"):
            step.rows(wrong, 1, prompt_masks)
    with pytest.raises(LayoutError, match="past_key_values"):
        part.keys("visual", 1, prompt_masks)
    for wrong in (99, torch.ones(5).bool()):
        with pytest.raises(LayoutError):
            part.keys(wrong, 1, prompt_masks)


# -- parts of a prompt -----------------------------------------------------------------------------------------------


def parts(inputs, chunk):
    """The inputs of a loop over chunks, the images in the first."""
    ids, images = inputs["input_ids"], bool(set(inputs) & {"pixel_values"})
    first = ids.shape[1] - 2 * chunk if images else chunk
    for start, stop in [(0, first), *((i, min(i + chunk, ids.shape[1])) for i in range(first, ids.shape[1], chunk))]:
        part = dict(inputs) if start == 0 else {}
        part |= {k: v[:, start:stop] for k, v in part.items() if k in ("attention_mask", "mm_token_type_ids")}
        yield start, stop, {**part, "input_ids": ids[:, start:stop], "use_cache": True}


@pytest.mark.parametrize("how", ["logits", "no logits", "static"])
@pytest.mark.parametrize("make", [model_inputs, lambda family: {"input_ids": text()}])
def test_a_loop_over_chunks_caches_the_rows_of_the_whole_prompt(family, make, how):
    model, inputs = wrapped(family), make(family)
    length = inputs["input_ids"].shape[1]
    logits, whole = model.run_with_cache(inputs)
    past = StaticCache(model.hf_model.config.get_text_config(), max_cache_len=length + 3) if how == "static" else None
    past = kv_cache(model) if past is None else past
    options = {"prompt_length": length, "return_logits": how != "no logits"}
    for start, stop, part in parts(inputs, 4):
        seen = []
        with model.hooks([("blocks.0.hook_resid_post", lambda x, hook, seen=seen: seen.append(x.clone()))]):
            output, cache = model.run_with_cache({**part, "past_key_values": past}, **options)
        assert cache.span == Span(start, stop, known=start)
        if how != "no logits":
            close(output, logits[:, start:stop], 1e-3)
        for layer in range(3):
            close(cache["pattern", layer][..., :stop], whole["pattern", layer][:, :, start:stop, :stop], 1e-4)
            close(cache["resid_post", layer], whole["resid_post", layer][:, start:stop], 1e-3)
        close(seen[0], whole["resid_post", 0][:, start:stop], 1e-3)
        close(cache.pattern(1, [stop - 1], [0, start]), whole.pattern(1, [stop - 1], [0, start]), 1e-4)
        close(cache.decompose_resid().sum(0), cache.accumulated_resid()[-1], 1e-3)
        close(cache.logit_lens([stop - 1])[-1], logits[:, [stop - 1]], 1e-3)
    close(cache.logit_lens("last")[-1], logits[:, -1:], 1e-3)


def test_without_a_return_type_the_patterns_are_those_of_the_prompt(family):
    model, inputs = wrapped(family), model_inputs(family)
    _, whole = model.run_with_cache(inputs, "*hook_pattern")
    past, rows = kv_cache(model), []
    site = model.wiring.text[1]
    for _, _, part in parts(inputs, 4):
        with model.registry.attached("blocks.1.attn.hook_pattern", lambda x, hook: rows.append(x), reads_only=True):
            model({**part, "past_key_values": past}, return_type=None, prompt_length=inputs["input_ids"].shape[1])
    assert not site.taps
    close(rows[-1], whole["pattern", 1][:, :, -rows[-1].shape[2] :], 1e-4)


def test_selected_positions_of_a_part(family):
    model, ids = wrapped(family), text()
    _, whole = model.run_with_cache({"input_ids": ids})
    for options in ({"queries": [12, 15], "keys": [3, 11]}, {"pos_slice": [15, 12]}, {"queries": "last"}):
        past = kv_cache(model)
        model({"input_ids": ids[:, :10], "past_key_values": past, "use_cache": True}, prompt_length=22)
        part = {"input_ids": ids[:, 10:], "past_key_values": past, "use_cache": True}
        _, cache = model.run_with_cache(part, prompt_length=22, **options)
        _, expected = model.run_with_cache({"input_ids": ids}, **options)
        for name in cache:
            if not name.endswith("hook_rot_k") and (name.endswith(("pattern", "scores")) or "pos_slice" in options):
                torch.testing.assert_close(cache[name], expected[name], atol=1e-3, rtol=1e-3, msg=name)
        if "queries" in options:
            close(cache.pattern(1, options["queries"], [3]), whole.pattern(1, options["queries"], [3]), 1e-4)
    with pytest.raises(LayoutError, match="positions 10 to 21"):
        past.crop(-12)
        model.run_with_cache(part, queries=[2], prompt_length=22)


def test_names_that_a_part_does_not_have(family):
    model, ids = wrapped(family), text()
    past = kv_cache(model)
    model({"input_ids": ids[:, :5], "past_key_values": past, "use_cache": True})
    part = {"input_ids": ids[:, 5:9], "past_key_values": past, "use_cache": True}
    _, cache = model.run_with_cache(part, prompt_length=22)
    with pytest.raises(LayoutError, match="last position of the prompt is 21"):
        cache.pattern(1, queries="last")
    with pytest.raises(LayoutError, match="before position 5"):
        cache.pattern(1, keys="text")
    assert cache.pattern(1, queries="text").shape[2] == 4
    with pytest.raises(InputError, match="past_key_values"):
        model.measure(part, metrics.AttentionScore(queries="last", keys="text"), progress=False)
    effect = metrics.AblationEffect(mode="zero", phase="prefill")
    objective = objectives.FunctionObjective(lambda logits, inputs: logits[:, -1, 5])
    for run in (
        lambda: effect.run(model, [part], objective=objective),
        lambda: HeadAblation.reference(model, [part], [(0, 1)]),
    ):
        with pytest.raises(InputError, match="past_key_values"):
            run()
    assert past.get_seq_length() == 9  # the rejected runs did not extend the KV cache


def test_a_token_behind_a_kv_cache(family):
    model, ids = wrapped(family), text()
    logits, whole = model.run_with_cache({"input_ids": ids})
    past = kv_cache(model)
    model({"input_ids": ids[:, :21], "past_key_values": past, "use_cache": True})
    _, cache = model.run_with_cache({"input_ids": ids[:, 21:], "past_key_values": past, "use_cache": True})
    close(cache["pattern", 1], whole["pattern", 1][:, :, 21:], 1e-4)
    close(cache.pattern(1, "last", [3]), whole.pattern(1, [21], [3]), 1e-4)
    close(cache.logit_lens()[-1], logits[:, 21:], 1e-3)


@pytest.mark.parametrize("all_tokens", [True, False])
def test_a_generation_behind_a_kv_cache(family, all_tokens):
    model, inputs = wrapped(family), {"input_ids": text()} if all_tokens else model_inputs(family)
    n = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    tokens, whole = model.run_with_cache(inputs, "blocks.*", generate=GREEDY)
    past = kv_cache(model)
    *firsts, (start, stop, last) = parts(inputs, 4)
    for _, _, part in firsts:
        model({**part, "past_key_values": past}, prompt_length=n)
    rest = {"input_ids": inputs["input_ids"] if all_tokens else last["input_ids"]}
    rest["attention_mask"] = inputs["attention_mask"]
    generated, cache = model.run_with_cache(rest, "blocks.*", generate={**GREEDY, "past_key_values": past})
    assert torch.equal(generated[:, -4:], tokens[:, -4:])
    assert [len(step.span) for step in cache] == [stop - start, 1, 1, 1]
    close(cache["pattern", 1], whole["pattern", 1][:, :, start:], 1e-4)
    close(cache.pattern(1, [n - 1, n], [0, n]), whole.pattern(1, [n - 1, n], [0, n]), 1e-4)


# -- steps of a generation -------------------------------------------------------------------------------------------


def test_names_in_every_step(family):
    model, inputs = hooked(family), sample(family)
    n = len(inputs)
    tokens, cache = model.run_with_cache(inputs, generate=GREEDY)
    region, mask = Box(0, 0, 16, 16), torch.arange(n) % 3 == 0
    for number, step in enumerate(cache):
        full = step["pattern", 2]
        for kind in ("target", "visual", "question", "template", "answer", "text", region, [region], mask):
            at = mask if isinstance(kind, torch.Tensor) else inputs.mask(kind)[0]
            close(step.pattern(2, keys=kind), full[..., :n][..., at])
            close(step.pattern(2, keys=kind, scores=True).exp(), step["attn_scores", 2][..., :n][..., at].exp())
        for keys in (-1, [0, n + number - 1], slice(2, 9), slice(-2, None)):
            close(step.pattern(2, keys=keys), full[..., [keys] if isinstance(keys, int) else keys])
        last = [-1] if number else inputs.mask("last")[0].nonzero()[0].tolist()  # an answer follows the prompt's last
        close(step.pattern(2, "last", "target", heads=[1]), full[:, [1]][:, :, last, :n][..., inputs.mask("target")[0]])
        if number:
            for row in ("last", 0, -1, n + number - 1, slice(None), torch.arange(n + number) == n + number - 1):
                close(step.pattern(2, queries=row), full)
            with pytest.raises(LayoutError, match="is not among the rows"):
                step.pattern(2, queries="question")
            close(step.logit_lens("last")[-1, :, 0], step["logits"][:, -1], 1e-3)
            close(step.decompose_resid().sum(0), step.accumulated_resid()[-1], 1e-4)
            close(step.logit_attrs(step.decompose_resid(), 7).sum(0), step["logits"][:, -1:, 7], 1e-3)
    assert torch.equal(cache.steps[1].logit_lens()[-1, :, 0].argmax(-1), tokens[:, n + 1])


def test_the_whole_sequence(family):
    model, inputs = hooked(family), batch(family)
    n = inputs.inputs["input_ids"].shape[1]
    _, cache = model.run_with_cache(inputs, generate=GREEDY)
    pattern = cache["pattern", 1]
    assert pattern.shape[2:] == (n + 3, n + 3)
    target = [mask.nonzero().flatten() for mask in inputs.mask("target")]
    rows = cache.pattern(1, queries=[n, n + 2], keys="target", heads=[1, 3])
    for b, at in enumerate(target):
        close(rows[b, :, :, : len(at)], pattern[b, [1, 3]][:, [n, n + 2]][..., at])
    last = inputs.mask("last").int().argmax(1)
    close(cache.pattern(1, "last")[:, :, 0], pattern[torch.arange(2), :, last])
    close(cache.logit_lens()[-1, :, 0], cache.steps[0].logit_lens()[-1, :, 0], 1e-4)
    close(cache.logit_lens([n - 1])[-1, :, 0], cache.steps[0]["logits"][:, -1], 1e-3)
    everywhere, labels = cache.logit_lens(slice(n, None), return_labels=True)
    assert labels[-1] == "final_post"
    close(everywhere[-1, :, 0], cache.steps[1]["logits"][:, 0], 1e-3)
    close(cache["vision", "pattern", 1], cache.steps[0]["vision", "pattern", 1])
    assert torch.equal(cache.pattern(1, tower="vision"), cache["vision", "pattern", 1])


def test_moved_cut_and_saved(family, tmp_path):
    model, inputs = hooked(family), batch(family)
    _, cache = model.run_with_cache(inputs, "blocks.*", generate=GREEDY, keys="target")
    meta = model.run_with_cache(inputs, ["blocks.*hook_z", "*rot_k"], generate=GREEDY)[1].to("meta")
    assert all(step["z", 0].device.type == "meta" for step in meta) and meta["rot_k", 0].device.type == "meta"
    one = cache.sample(1)
    cache.save(tmp_path / "g")
    for other in (cache.to("cpu"), GenerationCache.load(tmp_path / "g", model), one):
        which = slice(1, None) if other is one else slice(None)
        for kind in ("target", [3]):
            columns = other.steps[2].pattern(1, keys=kind) if kind == "target" else None
            if columns is not None:
                expected = cache.steps[2].pattern(1, keys=kind)[which]
                torch.testing.assert_close(columns, expected[..., : columns.shape[-1]], equal_nan=True)
        torch.testing.assert_close(other["z", 1], cache["z", 1][which])
        close(other.logit_lens(), cache.logit_lens()[:, which], 1e-4)
        assert [step.span for step in other] == [step.span for step in cache]


def test_files_of_earlier_versions_have_one_row_in_each_step(family, tmp_path):
    model = hooked(family)
    _, cache = model.run_with_cache(sample(family), "blocks.*", generate=GREEDY)
    spans = [step.span for step in cache]
    old = GenerationCache([step._like(span=None) for step in cache])
    close(old["pattern", 1], cache["pattern", 1])
    old.save(tmp_path / "g")
    again = GenerationCache.load(tmp_path / "g", model)
    assert [step.span for step in again] == spans
    close(again.steps[2].pattern(1, keys="target"), cache.steps[2].pattern(1, keys="target"))
    close(again.pattern(1, "question", "visual"), cache.pattern(1, "question", "visual"))


def test_moving_keeps_the_keys_that_steps_share_once(family):
    _, cache = hooked(family).run_with_cache(sample(family), "*hook_pattern", generate=GREEDY)
    keys = {id(step.entry(("pattern", 1)).k) for step in cache.to("cpu")}
    assert len(keys) == 1


def test_candidates_that_were_rejected_are_in_no_row_of_the_sequence(family):
    model, ids = wrapped(family), torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
    options = {**GREEDY, "max_new_tokens": 6, "min_new_tokens": 6}
    tokens, plain = model.run_with_cache({"input_ids": ids}, "blocks.*", generate=options)
    again, cache = model.run_with_cache(
        {"input_ids": ids}, "blocks.*", generate={**options, "prompt_lookup_num_tokens": 3}
    )
    assert torch.equal(tokens, again)
    length = min(cache["z", 1].shape[1], plain["z", 1].shape[1])
    assert length >= 14
    close(cache["z", 1][:, :length], plain["z", 1][:, :length], 1e-4)
    close(cache["pattern", 1][:, :, :length, :length], plain["pattern", 1][:, :, :length, :length], 1e-4)


# -- one run records each position once ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["blocks.*", "blocks.0.attn.hook_z", "*hook_pattern", "blocks.0.attn.hook_rot_k"])
@pytest.mark.parametrize("generate", [None, GREEDY])
def test_a_direct_call_of_the_model_in_a_hook_is_rejected(family, generate, names):
    model, inside = wrapped(family), []

    def nested(x, hook):
        if not inside:
            inside.append(1)
            model.hf_model(input_ids=text(), use_cache=False)

    with model.hooks([("blocks.1.hook_resid_post", nested)]), pytest.raises(HookValueError, match="computed twice"):
        model.run_with_cache({"input_ids": text()}, names, generate=generate)

"""Every intervention edits a prompt that is read in chunks as one that is read at once, in every phase."""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from helpers.wrapped import wrapped
from hooked_mllm import ActivationPatch, AttentionKnockout, HeadAblation, HeadPatch, Steer

LENGTH, HEADS = 17, [(0, 1), (1, 2), (2, 0)]
OPTIONS = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
POSITIONS = (None, [1, 8, -1], slice(3, 12), "last")


def tokens(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 40, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@cache
def source(family):
    return wrapped(family).run_with_cache(tokens(2))[1]


@cache
def reference(family, keep_tokens):
    return HeadAblation.reference(wrapped(family), [tokens(2), tokens(3)], HEADS, keep_tokens=keep_tokens)


def ablation(mode):
    def make(family, phase, positions):
        options = {"mean": {"reference": reference(family, False)}, "scale": {"factor": 3.0}}.get(mode, {})
        if mode == "resample":
            options = {"reference": reference(family, True), "seed": 3}
        at = None if phase == "decode" else positions
        return HeadAblation(HEADS, mode=mode, phase=phase, positions=at, **options)

    return make


def steer(family, phase, positions):
    direction = torch.linspace(-2, 2, wrapped(family).cfg.d_model)
    return Steer(direction, layer=1, positions=None if phase == "decode" else positions, phase=phase)


def knockout(family, phase, positions):
    return AttentionKnockout(HEADS, queries=None if phase == "decode" else positions, keys=[2, 3, 9], phase=phase)


def patch(site, **more):
    def make(family, phase, positions):
        return ActivationPatch(site, source(family), layers=1, positions=positions, **more)

    return make


def moved_patch(family, phase, positions):
    return ActivationPatch("resid_post", source(family), layers=1, positions=[1, 8, 16], source_positions=[4, 2, 11])


def head_patch(family, phase, positions):
    return HeadPatch(HEADS, source(family), positions=positions)


def moved_head_patch(family, phase, positions):
    return HeadPatch(HEADS, source(family), positions=[0, 15], source_positions=[6, 7])


IN_PHASES = {
    **{mode: ablation(mode) for mode in ("zero", "mean", "resample", "uniform", "scale")},
    "steer": steer,
    "knockout": knockout,
}
IN_PREFILL = {
    "patch resid": patch("resid_post"),
    "patch pattern": patch("pattern", heads=[1]),
    "patch scores": patch("attn_scores", heads=[1]),
    "patch z": patch("z"),
    "patch k": patch("k"),
    "patch from other positions": moved_patch,
    "heads": head_patch,
    "heads from other positions": moved_head_patch,
}


def same(family, intervention, chunk) -> None:
    """The logits of all steps, of a prompt at once and in chunks; the edit changes them."""
    model, inputs = wrapped(family), tokens(1)
    with model.intervene(intervention):
        whole = model.generate(inputs, **OPTIONS)
    with model.intervene(intervention):
        chunked = model.generate(inputs, prefill_chunk_size=chunk, **OPTIONS)
    for a, b in zip(whole.logits, chunked.logits, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4)
    plain = model.generate(inputs, **OPTIONS)
    assert any(not torch.equal(a, b) for a, b in zip(whole.logits, plain.logits, strict=True))


@pytest.mark.parametrize("name", IN_PHASES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunk=st.integers(1, LENGTH), phase=st.sampled_from(["prefill", "decode", "both"]), at=st.sampled_from(POSITIONS)
)
def test_phases_and_positions(family, name, chunk, phase, at):
    same(family, IN_PHASES[name](family, phase, at), chunk)


@pytest.mark.parametrize("name", IN_PREFILL)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunk=st.integers(1, LENGTH), at=st.sampled_from(POSITIONS))
def test_patches_of_the_prompt(family, name, chunk, at):
    same(family, IN_PREFILL[name](family, "prefill", at), chunk)


@pytest.mark.parametrize("name", [*IN_PHASES, *IN_PREFILL])
def test_a_loop_over_chunks(family, name):
    model, inputs = wrapped(family), tokens(1)
    intervention = (IN_PHASES | IN_PREFILL)[name](family, "prefill", [1, 8, -1])
    with model.intervene(intervention):
        expected, chunk, logits = model(inputs), 5, []
        past = DynamicCache(config=model.hf_model.config.get_text_config())
        for first in range(0, LENGTH, chunk):
            part = {"input_ids": inputs["input_ids"][:, first : first + chunk], "past_key_values": past}
            logits.append(model({**part, "use_cache": True}, prompt_length=LENGTH))
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4, 6, LENGTH])
def test_steps_of_hooks_count_generated_tokens(family, chunk):
    steps = []
    with wrapped(family).hooks([("blocks.1.hook_resid_post", lambda x, hook: steps.extend([hook.step] * x.shape[1]))]):
        wrapped(family).generate(tokens(1), prefill_chunk_size=chunk, max_new_tokens=4, do_sample=False)
    assert steps == [0] * LENGTH + [1, 2, 3]

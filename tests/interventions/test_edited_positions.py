"""The positions that are edited in prompts, generated tokens and beams."""

import pytest
import torch

from helpers.ablation_witness import CHOSEN, ablate, by_hand
from helpers.intervention_witness import GREEDY, batch, sample, z_replaced
from helpers.tiny import HEADS
from helpers.wrapped import wrapped
from hooked_mllm import HeadAblation
from hooked_mllm.errors import HookValueError, LayoutError
from hooked_mllm.interventions.edited_positions import check_edited_positions


@pytest.mark.parametrize("specified", [slice(2, 5), [2, 3, 4], "mask", -3])
@torch.no_grad()
def test_positions_in_every_way(family, specified):
    inputs = sample(family)
    mask = torch.zeros(1, len(inputs), dtype=torch.bool)
    mask[:, -3 if specified == -3 else slice(2, 5)] = True
    positions = mask if isinstance(specified, str) else specified
    with wrapped(family).intervene(HeadAblation(CHOSEN, mode="zero", phase="prefill", positions=positions)):
        got = wrapped(family)(inputs)
    zero = by_hand(lambda z, l, h: 0)
    with z_replaced(family, lambda z, l: torch.where(mask[..., None, None], zero(z, l), z)) as model:
        assert torch.equal(got, model(**inputs.inputs).logits)


# -- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
@torch.no_grad()
def test_phases_of_a_generation(family, phase):
    inputs, model = batch(family), wrapped(family)
    change = by_hand(lambda z, l, h: -3 * z[:, :, h])

    def at_phase(z, layer):
        now = "decode" if z.shape[1] == 1 else "prefill"
        return change(z, layer) if phase in (now, "both") else None

    with z_replaced(family, at_phase) as witness:
        expected = witness.generate(**inputs.inputs, **GREEDY)
    with model.intervene(HeadAblation(CHOSEN, mode="scale", factor=-3, phase=phase)) as records:
        assert torch.equal(model.generate(inputs, **GREEDY), expected)
        assert torch.equal(model.generate(inputs, **GREEDY, use_cache=False), expected)
        if family == "llava_onevision":
            assert torch.equal(model.generate(inputs, **GREEDY, cache_implementation="static"), expected)
    assert not torch.equal(expected, model.generate(inputs, **GREEDY))
    assert bool(records[0]["applied"]["decode"]) or phase == "prefill"


@pytest.mark.parametrize("mode", ["resample", "uniform", "mean"])
@torch.no_grad()
def test_a_generation_without_cache_is_ablated_as_one_with_it(family, mode):
    inputs, model = sample(family), wrapped(family)
    options = {}
    if mode != "uniform":
        options["reference"] = HeadAblation.reference(model, sample(family, 1), CHOSEN, keep_tokens=True)
    if mode == "resample":
        options["seed"] = 5
    with model.intervene(HeadAblation(CHOSEN, mode=mode, phase="both", positions="visual", **options)):
        tokens = model.generate(inputs, **GREEDY)
        assert torch.equal(tokens, model.generate(inputs, **GREEDY, use_cache=False))
        logits = model(inputs)
    assert not torch.equal(logits, model(inputs))  # greedy tokens need not change, whatever was ablated


@torch.no_grad()
def test_beams_are_ablated_at_their_own_samples_positions(family):
    inputs, model = batch(family), wrapped(family)
    question = inputs.mask("question").repeat_interleave(2, 0)

    def change(z, layer):
        if z.shape[1] == 1:
            return None
        rows = question if len(z) == 4 else inputs.mask("question")
        return torch.where(rows[..., None, None], by_hand(lambda z, l, h: -3 * z[:, :, h])(z, layer), z)

    options = {**GREEDY, "num_beams": 2}
    with z_replaced(family, change) as witness:
        expected = witness.generate(**inputs.inputs, **options)
    ablation = HeadAblation(CHOSEN, mode="scale", factor=-3, phase="prefill", positions="question")
    with model.intervene(ablation):
        assert torch.equal(model.generate(inputs, **options), expected)
        logits = model(inputs)
    assert not torch.equal(logits, model(inputs))  # the beams need not change, whatever was ablated


def test_positions_that_a_run_does_not_have(family):
    model = wrapped(family)
    with pytest.raises(LayoutError, match="'question'"), model.intervene(ablate(positions="question")):
        model(sample(family).inputs)  # a mapping has no question
    with pytest.raises(LayoutError, match="outside"), model.intervene(ablate(positions=[9999])):
        model(sample(family))
    assert HEADS == model.cfg.n_heads and not model.list_hooks()


@pytest.mark.parametrize(
    ("selected", "phase", "tower", "error", "message"),
    [
        (None, "prompt", "text", HookValueError, "phase must be one of 'prefill', 'decode', 'both'; got 'prompt'"),
        (None, "prefill", "audio", HookValueError, "tower must be one of 'text', 'vision'; got 'audio'"),
        ("visual", "decode", "text", HookValueError, "phase='decode' acts on generated tokens alone"),
        ([0, 1], "decode", "text", HookValueError, "phase='decode' acts on generated tokens alone"),
        (None, "both", "vision", HookValueError, "in the vision tower take phase='prefill'"),
        ("target", "prefill", "vision", LayoutError, "Positions of the vision tower have no names"),
    ],
)
def test_positions_and_phases_that_exclude_each_other(selected, phase, tower, error, message):
    with pytest.raises(error, match=message):
        check_edited_positions(selected, phase, tower)


@pytest.mark.parametrize("phase", ["prefill", "decode", "both"])
def test_the_last_position_is_one_in_every_phase(phase):
    assert check_edited_positions("last", phase, "text") is None


def test_the_first_position_that_any_sample_edits():
    s, model = sample("qwen3_vl"), wrapped("qwen3_vl")
    question = s.layout.spans("question")[0][0]
    for positions, first in ((None, 0), ([7, 5, 9], 5), ("question", question)):
        assert ablate(positions=positions).first_position(model, model.resolve(s)) == first
    in_vision = ablate(positions=[7, 5], tower="vision")
    assert in_vision.first_position(model, model.resolve(s)) == 0

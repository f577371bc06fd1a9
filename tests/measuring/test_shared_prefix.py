"""What samples share before their questions, and the reasons to run them whole."""

from dataclasses import replace

import pytest
import torch

from helpers.tiny import tiny_image
from helpers.wrapped import fresh, wrapped
from hooked_mllm import HookedMLLM, SampleBatch, metrics
from hooked_mllm.errors import InputError
from hooked_mllm.measuring.shared_prefix import SharedPrefix, common_prefix, reasons_to_run_whole

QUESTIONS = ("What colour is the mug?", "Where is the dog in the picture of the star?")


def samples(family, pictures=(0, 0)):
    """Two questions, each about the picture of its number."""
    return [
        wrapped(family).prepare(question, images=tiny_image(32, 24, seed=seed))
        for question, seed in zip(QUESTIONS, pictures, strict=True)
    ]


def test_the_prefix_ends_where_ids_differ_or_a_question_begins(family):
    pair = samples(family)
    ids = [sample.inputs["input_ids"][0].tolist() for sample in pair]
    starts = [sample.layout.spans("question")[0][0] for sample in pair]
    equal = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    assert common_prefix(pair) == min(equal, *starts) > 5
    assert common_prefix(pair[:1] * 2) == starts[0], "equal questions are not shared"


def test_other_pixels_share_nothing(family):
    assert common_prefix(samples(family, (0, 1))) == 0


def test_samples_of_other_inputs_share_nothing(family):
    first, second = samples(family)
    more = {**second.inputs, "more": torch.ones(1)}
    assert common_prefix([first, replace(second, inputs=more)]) == 0


@pytest.mark.parametrize(("side", "shares"), [("right", True), ("left", False)])
def test_a_batch_padded_on_the_left_shares_nothing(side, shares):
    pair = samples("qwen3_vl")
    batch = SharedPrefix.collate(pair, side)
    assert isinstance(batch, SampleBatch) and (batch.prefix == common_prefix(pair)) == shares
    assert shares or batch.prefix == 0
    assert torch.equal(batch.mask("question"), SampleBatch.collate(pair, side).mask("question"))
    assert set(batch.resolved(None).tensors) == {"input_ids"}


def test_without_a_reason_the_prefix_is_run_once(family):
    model, batch = wrapped(family), SharedPrefix.collate(samples(family))
    assert reasons_to_run_whole(model, batch, [metrics.VisionMass()]) == []
    (reason,) = reasons_to_run_whole(model, replace(batch, prefix=0), [])
    assert reason == "the samples share no prefix before their questions"


def test_each_reason_is_named():
    batch = SharedPrefix.collate(samples("qwen3_vl"))
    model = HookedMLLM.from_model(fresh("qwen3_vl"), wrapped("qwen3_vl").processor, check=False)

    def reasons(*measured):
        return reasons_to_run_whole(model, batch, measured)

    with model.hooks([("blocks.0.attn.hook_z", lambda z, hook: None)]):
        assert reasons() == ["hooks or interventions are registered on the model"]
    handle = model.hf_model.model.register_forward_hook(lambda *_: None)
    assert reasons() == ["torch hooks are registered on the model"]
    handle.remove()
    model.hf_model.train()
    assert reasons() == ["the model is in training mode"]
    model.hf_model.eval()
    (before,) = reasons(metrics.AttentionScore(queries="visual", keys="visual"))
    assert "reads rows of 'visual', some of which are before the question" in before
    (unknown,) = reasons(object())
    assert "may read rows before the question" in unknown
    assert reasons() == []


def test_an_empty_batch():
    with pytest.raises(InputError):
        SharedPrefix.collate([])

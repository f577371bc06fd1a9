"""A sample remembers all it was prepared with, and prepared again it is the same tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.tiny import tiny_frames, tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import Box, Frames, SampleBatch, Video
from hooked_mllm.corruptions import Corruption, ImageNoise
from hooked_mllm.corruptions.base import prepared_again
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.sample import Preparation

OPTIONS = {
    "qwen3_vl": {"size": {"shortest_edge": 256, "longest_edge": 8 * 64}},
    "llava_onevision": {"do_rescale": False},
    "internvl": {"crop_to_patches": False},
}


class Nothing(Corruption):
    def changes(self, sample):
        return {}

    def describe(self):
        return {"corruption": "Nothing"}


def full(family, **more):
    """A sample with everything that `prepare` takes."""
    clip = Video.from_frames(tiny_frames(4), times_s=[0, 0.5, 1.25, 2])
    video = {} if family == "llava_onevision" else {"videos": clip}  # it takes images or videos
    given = {
        "images": [tiny_image(32, 24, 1), tiny_image(24, 32, 2)],
        **video,
        "system": "Be brief, and look twice.",
        "answer": "the mug",
        "target": [Box(3, 3, 9, 9), Box(0, 0, 24, 32, image=1)],
        "id": "full",
        "min_overlap": 0.6,
        **OPTIONS[family],
        **more,
    }
    return wrapped(family).prepare("What colour is the mug?", **given)


def same(a, b):
    assert a.inputs.keys() == b.inputs.keys()
    for name, value in a.inputs.items():
        assert value.dtype == b.inputs[name].dtype and torch.equal(value, b.inputs[name]), name
    for name in ("question", "answer", "id", "template", "pad_token_id", "preparation"):
        assert getattr(a, name) == getattr(b, name), name
    assert torch.equal(a.target_mask, b.target_mask)
    assert torch.equal(a.layout.kinds, b.layout.kinds) and torch.equal(a.layout.item, b.layout.item)


def test_nothing_is_lost(family):
    sample = full(family)
    assert sample.preparation == Preparation("Be brief, and look twice.", 0.6, OPTIONS[family])
    same(prepared_again(wrapped(family), sample, {}), sample)
    # each of them matters: without it the inputs or the target would be others
    plain = {"system": None, "min_overlap": 0.0, **{name: None for name in OPTIONS[family]}}
    for name in plain:
        how = sample.preparation
        processor = {k: v for k, v in how.processor.items() if k != name}
        lost = replace(how, processor=processor)
        if name in ("system", "min_overlap"):
            lost = replace(how, **{name: plain[name]})
        with pytest.raises(AssertionError):
            same(prepared_again(wrapped(family), replace(sample, preparation=lost), {}), sample)


def test_each_sample_of_a_batch_is_prepared_again_with_its_own_arguments(family):
    batch = wrapped(family).prepare(
        ["What is it?", "Where is the mug?"],
        [tiny_image(32, 24), tiny_image(24, 24)],
        system=["Be brief.", None],
        padding_side="right",
    )
    assert [s.preparation.system for s in batch] == ["Be brief.", None]
    noisy = ImageNoise(30)(wrapped(family), batch)
    assert isinstance(noisy, SampleBatch) and noisy.padding_side == "right"
    assert torch.equal(noisy.inputs["input_ids"], batch.inputs["input_ids"])
    for clean, other in zip(batch, noisy, strict=True):
        alone = ImageNoise(30)(wrapped(family), clean)
        assert torch.equal(alone.inputs["pixel_values"], other.inputs["pixel_values"])


def test_videos_keep_their_times(family):
    clip = Video.from_frames(tiny_frames(4), times_s=[0, 0.5, 1.25, 2])
    target = Frames(0.4, 1.5, box=(0, 0, 16, 12))
    sample = wrapped(family).prepare("What is it?", videos=[clip], target=target, num_frames=2)
    same(prepared_again(wrapped(family), sample, {}), sample)
    noisy = ImageNoise(30, region="target")(wrapped(family), sample)
    assert noisy.videos[0].times_s == clip.times_s and noisy.videos[0].fps == clip.fps
    changed = (noisy.videos[0].frames != clip.frames).any(-1)
    assert changed[1:3, :12, :16].mean() > 0.9
    changed[1:3, :12, :16] = False
    assert not changed.any()


def test_the_counterpart_lies_where_the_sample_lies(family):
    sample = full(family).to(dtype=torch.bfloat16)
    noisy = ImageNoise(30)(wrapped(family), sample)
    for name, value in sample.inputs.items():
        assert noisy.inputs[name].dtype == value.dtype and noisy.inputs[name].device == value.device


def test_what_cannot_be_prepared_again_is_rejected(family):
    model, sample = wrapped(family), full(family)
    with pytest.raises(InputError, match="no record of its preparation.*make it with"):
        ImageNoise(30)(model, replace(sample, preparation=None))
    with pytest.raises(InputError, match="another chat template"):
        ImageNoise(30)(model, replace(sample, template="0123"))
    with pytest.raises(InputError, match=r"Nothing\(\) changes nothing in the model inputs"):
        Nothing()(model, sample)
    with pytest.raises(TypeError, match="abstract"):
        Corruption()


def test_samples_made_by_hand_still_need_no_preparation(family):
    sample = full(family)
    by_hand = type(sample)(sample.inputs, sample.layout, sample.question)
    assert by_hand.preparation is None
    assert torch.equal(wrapped(family)(by_hand), wrapped(family)(sample))
    np.testing.assert_array_equal(by_hand.mask("question"), sample.mask("question"))

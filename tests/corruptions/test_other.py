"""Other pictures and other questions: which is drawn, what is resized, and when a pair corresponds."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import tiny_frames, tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import Box, SampleBatch, Video
from hooked_mllm.corruptions import (
    BlurRegion,
    ImageNoise,
    MeanRegion,
    OtherImage,
    OtherQuestion,
    SwapRegion,
    check_pair,
)
from hooked_mllm.errors import InputError, LayoutError

QUESTION = "What colour is the mug?"


def sample_of(family, seed=0, size=(40, 30), **more):
    given = {"target": Box(2, 3, 12, 9), "answer": "red", **more}
    return wrapped(family).prepare(QUESTION, images=tiny_image(*size, seed), **given)


def test_another_picture_is_resized_to_the_size_of_the_sample_s(family):
    sample, other = sample_of(family), tiny_image(17, 51, 9)
    corrupted = OtherImage(other)(wrapped(family), sample)
    due = other.resize((40, 30), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(corrupted.images[0]), np.asarray(due))
    check_pair(sample, corrupted)
    assert torch.equal(sample.inputs["input_ids"], corrupted.inputs["input_ids"])
    assert (corrupted.question, corrupted.answer, corrupted.target) == (QUESTION, "red", sample.target)
    assert torch.equal(sample.target_mask, corrupted.target_mask)


def test_a_picture_left_as_it_is_must_give_the_same_tokens():
    model, sample = wrapped("qwen3_vl"), sample_of("qwen3_vl", target=None)
    same = tiny_image(40, 30, 5)
    kept = OtherImage(same, resize=False)(model, sample)
    np.testing.assert_array_equal(np.asarray(kept.images[0]), np.asarray(same))
    with pytest.raises(LayoutError, match=r"tokens against .*Clean: TokenLayout\(.*40x30.*Corrupted:.*24x24"):
        OtherImage(tiny_image(24, 24, 5), resize=False)(model, sample)


def test_candidates_are_drawn_by_seed_and_sample_and_never_the_sample_itself(family):
    model, samples = wrapped(family), [sample_of(family, seed) for seed in range(5)]
    pixels = [np.asarray(s.images[0]) for s in samples]

    def drawn(corruption, sample):
        got = np.asarray(corruption(model, sample).images[0])
        return next(i for i, p in enumerate(pixels) if np.array_equal(p, got))

    chosen = {(seed, i): drawn(OtherImage(samples, seed), s) for seed in range(3) for i, s in enumerate(samples)}
    assert all(i != found for (_, i), found in chosen.items())
    assert len(set(chosen.values())) > 2
    by_row = [tuple(chosen[seed, i] for i in range(5)) for seed in range(3)]
    assert len(set(by_row)) > 1
    as_batch, as_pictures = SampleBatch.collate(samples), [s.images[0] for s in samples]
    for pool in (as_batch, [as_batch], as_pictures, [np.asarray(p) for p in as_pictures], np.stack(pixels)):
        assert drawn(OtherImage(pool, 1), samples[2]) == chosen[1, 2]  # the order of the pool is what counts
    assert drawn(OtherImage(samples, 1), sample_of(family, 2)) == chosen[1, 2]


def test_one_candidate_replaces_all_pictures():
    model = wrapped("qwen3_vl")
    pages = [tiny_image(40, 30, 1), tiny_image(30, 40, 2)]
    sample = model.prepare(QUESTION, images=pages)
    others = [tiny_image(30, 30, 3), tiny_image(50, 30, 4)]
    corrupted = OtherImage([tiny_image(8, 8), others, [*others, others[0]]])(model, sample)
    assert [i.size for i in corrupted.images] == [(40, 30), (30, 40)]
    for got, page, other in zip(corrupted.images, pages, others, strict=True):
        due = other.resize(page.size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(due))
    with pytest.raises(InputError, match="None of the 2 candidates can replace .* 2 images and 0 videos: a candidate"):
        OtherImage([others[0], others[1]])(model, sample)
    with pytest.raises(InputError, match="None of the 1 candidates.*other pictures than the sample's own"):
        OtherImage(sample)(model, sample)


def test_another_video_keeps_the_times(family):
    clip = Video.from_frames(tiny_frames(4, 40, 30), times_s=[0, 0.5, 1.25, 2])
    other = Video.from_frames(tiny_frames(4, 20, 20, seed=7), fps=30)
    sample = wrapped(family).prepare(QUESTION, videos=[clip])
    for pool in (other, [other], wrapped(family).prepare("What?", videos=[other])):
        got = OtherImage(pool)(wrapped(family), sample).videos[0]
        assert got.times_s == clip.times_s and got.fps == clip.fps
        due = [np.asarray(Image.fromarray(f).resize((40, 30), Image.Resampling.BICUBIC)) for f in other.frames]
        np.testing.assert_array_equal(got.frames, due)
    for short in (Video.from_frames(tiny_frames(2, 40, 30, seed=7), fps=1), tiny_image()):
        with pytest.raises(InputError, match="0 images and 1 videos of 4 frames"):
            OtherImage(short)(wrapped(family), sample)


def test_another_question_of_the_same_pictures(family):
    model, sample = wrapped(family), sample_of(family, system="Be brief.")
    longer = "Where is the dog in the picture of the star?"
    for text in (longer, lambda s: longer if s.answer == "red" else ""):
        corrupted = OtherQuestion(text)(model, sample)
        direct = sample_of(family, system="Be brief.").images
        again = model.prepare(longer, images=list(direct), system="Be brief.", answer="red", target=sample.target)
        for name, value in again.inputs.items():
            assert torch.equal(corrupted.inputs[name], value), name
        assert corrupted.question == longer and corrupted.answer == "red"
    with pytest.raises(
        LayoutError, match=r"\d+ tokens against \d+. Clean: .*Corrupted: .*questions of the same number"
    ):
        check_pair(sample, corrupted)
    same_length = OtherQuestion("What colour is the mug!")(model, sample)
    check_pair(sample, same_length)
    with pytest.raises(InputError, match="changes nothing"):
        OtherQuestion(QUESTION)(model, sample)
    with pytest.raises(InputError, match="question is empty"):
        OtherQuestion(lambda s: "")(model, sample)


def test_pairs_are_samples_of_corresponding_positions():
    model = wrapped("qwen3_vl")
    one, other = sample_of("qwen3_vl"), sample_of("qwen3_vl", seed=1)
    check_pair(one, other)
    check_pair(SampleBatch.collate([one, other]), SampleBatch.collate([other, one]))
    with pytest.raises(InputError, match="Expected 2 corrupted samples, one for each clean one; got 1"):
        check_pair(SampleBatch.collate([one, other]), SampleBatch.collate([one]))
    with pytest.raises(InputError, match="two Samples or two SampleBatches; got Sample and dict"):
        check_pair(one, other.inputs)
    # as many tokens, of other kinds: the answer takes one of the question's
    long_question = model.prepare("red red red", images=tiny_image(40, 30), answer="red")
    moved = model.prepare("red red", images=tiny_image(40, 30), answer=" redred")
    assert len(long_question) == len(moved)
    with pytest.raises(LayoutError, match=r"position \d+ is another kind of token"):
        check_pair(long_question, moved)


def test_what_cannot_be_drawn_from_is_rejected():
    with pytest.raises(InputError, match="no pictures to draw from"):
        OtherImage([])
    with pytest.raises(InputError, match="seed is an integer"):
        OtherImage(tiny_image(), seed=-1)
    with pytest.raises(InputError, match="no images and no videos to replace"):
        OtherImage(tiny_image())(wrapped("qwen3_vl"), wrapped("qwen3_vl").prepare(QUESTION))
    with pytest.raises(InputError, match="a text, or a function of the sample; got int"):
        inspect.unwrap(OtherQuestion.__init__)(object.__new__(OtherQuestion), 5)


def test_descriptions_are_json_and_complete():
    descriptions = [
        corruption.describe()
        for corruption in (
            OtherImage(tiny_image()),
            OtherImage([tiny_image()] * 3, seed=2, resize=False),
            BlurRegion(3),
            BlurRegion(np.float64(3), None),
            MeanRegion([Box(0, 0, 4, 4)]),
            MeanRegion(of="region"),
            SwapRegion(),
            SwapRegion(seed=1),
            SwapRegion(Box(0, 0, 4, 4)),
            SwapRegion(len),
            ImageNoise(3),
            ImageNoise(3, "target", 1),
            OtherQuestion("What?"),
            OtherQuestion(len),
        )
    ]
    assert json.loads(json.dumps(descriptions)) == descriptions
    assert len({json.dumps(d) for d in descriptions}) == len(descriptions)
    assert descriptions[1] == {"corruption": "OtherImage", "candidates": 3, "seed": 2, "resize": False}
    assert repr(BlurRegion(3)) == "BlurRegion(sigma=3.0, region='target')"

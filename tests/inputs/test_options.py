"""Options of a call, and of a processor's own configuration: the layout follows them, or they are rejected."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from helpers.coordinates import (
    RAW,
    centre_error,
    coordinate_image,
    internvl_tokens,
    layout_of,
    media_of,
    qwen_tokens,
    real,
    seen,
)
from helpers.tiny import tiny_config, tiny_frames, tiny_image, tiny_model, tiny_processor
from helpers.videos import NASA
from hooked_mllm.errors import InputError
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.options import frame_sampler, merged_options, processor_in_effect
from hooked_mllm.inputs.preparer import Preparer

QUESTION = "What colour is the mug?"
TEXT = {"qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>", "internvl": "<IMG_CONTEXT>"}
TOKENS = {"qwen3_vl": qwen_tokens, "internvl": internvl_tokens}
#: options that the layout follows
FOLLOWED = {
    "qwen3_vl": [
        {"size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 40}},
        {"images_kwargs": {"size": {"shortest_edge": 32 * 32 * 900, "longest_edge": 32 * 32 * 2000}}},
        {"do_resize": False},
    ],
    "internvl": [
        {"max_patches": 3},
        {"min_patches": 6},
        {"images_kwargs": {"max_patches": 7, "min_patches": 5}},
        {"images_kwargs": {"crop_to_patches": False}},
        {"crop_to_patches": False, "max_patches": 2},
    ],
}


def prepared(family: str, own: dict | None = None, part: str = "image_processor", videos: bool = False, **options):
    config, processor = tiny_config(family), tiny_processor(family)
    for name, value in (own or {}).items():
        setattr(getattr(processor, part), name, value)
    prepare = Preparer(processor, config, family_of(config))
    media = {"videos": [(tiny_frames(4), 2.0)]} if videos else {"images": tiny_image(56, 40)}
    return prepare(QUESTION, **media, **options)


@pytest.mark.parametrize("where", ["call", "own"])
@pytest.mark.parametrize(
    ("family", "options"), [(family, options) for family, each in FOLLOWED.items() for options in each]
)
def test_the_layout_follows_options(family, options, where):
    config, processor = real(family)
    picture = coordinate_image(640, 416)
    if where == "own":
        for name, value in options.get("images_kwargs", options).items():
            setattr(processor.image_processor, name, value)
        if "crop_to_patches" in str(options):
            processor.images_kwargs = {}  # InternVL's processor sets it in each call
        options = {}
    inputs = processor(text=TEXT[family], images=[picture], **options, **RAW)
    effective = processor_in_effect(processor, merged_options(processor, options))
    layout = layout_of(config, effective, inputs, media_of(picture))
    saw = seen(TOKENS[family](inputs["pixel_values"]))
    assert centre_error(layout.boxes[layout.visual].numpy(), saw).max() <= 0.5


def test_smaller_tiles_of_internvl_with_as_many_tokens():
    config, processor = tiny_config("internvl"), tiny_processor("internvl")
    processor.image_seq_length = 16
    sample = Preparer(processor, config, family_of(config))(
        QUESTION, images=tiny_image(64, 32), size={"height": 32, "width": 32}
    )
    views = sample.layout.boxes[sample.layout.visual].reshape(3, 16, 4)  # two tiles and the thumbnail
    assert views[0, 0].tolist() == [0, 0, 8, 8]
    assert views[1, -1].tolist() == [56, 24, 64, 32]
    assert views[2, 0].tolist() == [0, 0, 16, 8]
    rows = family_of(config).vision_rows(sample.inputs, config)
    assert rows == [[(0, 3)]]
    with torch.no_grad():
        assert torch.isfinite(tiny_model("internvl")(**sample.inputs).logits).all()


SQUARE = {"height": 32, "width": 32}
REJECTED = {
    "qwen3_vl": [{"merge_size": 4}, {"merge_size": 1}, {"patch_size": 8}, {"temporal_patch_size": 1}],
    "llava_onevision": [
        {"size": SQUARE},
        {"size": {"height": 27, "width": 27}},
        {"size": {"height": 28, "width": 56}},
        {"size": 32},
        {"size": {"shortest_edge": 32}},
        {"size": SQUARE, "do_center_crop": True, "crop_size": {"height": 28, "width": 28}},
        {"do_center_crop": True, "crop_size": {"height": 14, "width": 14}},
    ],
    "internvl": [
        {"size": SQUARE},
        {"size": {"height": 16, "width": 32}},
        {"size": {"height": 20, "width": 20}},
        {"size": 32},
    ],
}
IMAGES = {
    "qwen3_vl": [],
    "llava_onevision": [
        {"image_grid_pinpoints": [[28, 28]]},
        {"image_grid_pinpoints": [[56, 56], [28, 28], [28, 56], [56, 28]]},
        {"crop_size": {"height": 14, "width": 14}},
    ],
    "internvl": [{"size": SQUARE, "crop_to_patches": False}],
}
VIDEOS = {
    "qwen3_vl": [],
    "llava_onevision": [{"do_resize": False}, {"size": {"shortest_edge": 28}}],
    "internvl": [
        {"do_resize": False},
        {"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
        {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
    ],
}
CASES = [
    (family, options, videos)
    for videos, more in ((False, IMAGES), (True, VIDEOS))
    for family in REJECTED
    for options in [*REJECTED[family], *more[family]]
]


@pytest.mark.parametrize("where", ["call", "kind", "own"])
@pytest.mark.parametrize(("family", "options", "videos"), CASES)
def test_options_that_do_not_fit_the_model_are_rejected(family, options, videos, where):
    part, kind = ("video_processor", "videos_kwargs") if videos else ("image_processor", "images_kwargs")
    call = {"call": options, "kind": {kind: options}, "own": {}}[where]
    with pytest.raises(InputError, match=r"leave|rejects these"):
        prepared(family, options if where == "own" else None, part, videos, **call)


def test_options_of_the_other_kind_of_media_do_not_matter(family):
    for videos, part in ((True, "image_processor"), (False, "video_processor")):
        own = {"size": {"height": 4, "width": 4}, "patch_size": 7, "image_grid_pinpoints": [[1, 1]]}
        assert prepared(family, own, part, videos).layout.visual.any()


@pytest.mark.parametrize("name", ["min_frames", "max_video_tokens"])
def test_options_without_effect_in_a_call_are_rejected(name):
    with pytest.raises(InputError, match=f"{name} has no effect in a call: set processor.video_processor.{name}"):
        prepared("qwen3_vl", videos=True, **{name: 8})


def test_options_of_a_wrong_type_are_rejected(family):
    for options in ({"do_resize": "yes"}, {"images_kwargs": {"size": "large"}}, {"return_tensors": "np"}):
        with pytest.raises(InputError, match="rejects these"):
            prepared(family, **options)


def test_options_of_videos_reach_the_processor():
    plain = prepared("qwen3_vl", videos=True).layout
    size = {"size": {"shortest_edge": 16 * 64, "longest_edge": 32 * 64}}
    for options in ({"videos_kwargs": size}, size, {"videos_kwargs": {**size, "do_sample_frames": True}}):
        smaller = prepared("qwen3_vl", videos=True, **options).layout
        assert 0 < smaller.visual.sum() < plain.visual.sum()
    small = {"cap_pixels_per_frame": True, "size": {"shortest_edge": 64, "longest_edge": 64 * 64}}
    assert prepared("qwen3_vl", videos=True, **small).layout.visual.any()


# -- frames of files ---------------------------------------------------------------------------------------------------

LENGTHS = [(1, 25.0), (7, 10.0), (97, 30000 / 1001), (390, 24.0), (700, 60.0)]
HOW = [{}, {"fps": 1}, {"fps": 2.5}, {"num_frames": 1}, {"num_frames": 6}, {"max_frames": 5}]


@pytest.mark.parametrize(("total", "rate"), LENGTHS)
@pytest.mark.parametrize("how", HOW)
def test_frames_are_those_of_the_processor(family, total, rate, how):
    own = tiny_processor(family).video_processor
    sampler = frame_sampler(own, {"do_sample_frames": own.do_sample_frames}, **how)
    meta = VideoMetadata(total_num_frames=total, fps=rate)
    count = {"num_frames": min(how["num_frames"], total)} if "num_frames" in how else how
    if "max_frames" in how:
        count = {} if family == "qwen3_vl" else {"num_frames": min(5, total)}
        own.max_frames = 5
    if how or own.do_sample_frames:
        try:
            theirs = own.sample_frames(meta, **count)
        except ArithmeticError:  # less than one frame
            with pytest.raises(InputError, match=f"cannot sample {total} frames at .* with fps="):
                sampler(total, rate)
            return
    else:
        theirs = np.arange(total)  # do_sample_frames=False
    if "max_frames" in how and total <= 5 and family != "qwen3_vl":
        theirs = np.arange(total)
    assert sampler(total, rate).tolist() == np.asarray(theirs).tolist()


@pytest.mark.parametrize(
    ("own", "options", "how"),
    [
        ({}, {"videos_kwargs": {"fps": 1}}, {"fps": 1}),
        ({}, {"videos_kwargs": {"num_frames": 5}}, {"num_frames": 5}),
        ({"do_sample_frames": True, "num_frames": 9}, {}, {}),
        ({"num_frames": 9}, {"fps": 0.5}, {"fps": 0.5}),
        ({}, {"num_frames": 4, "do_sample_frames": False}, {"num_frames": 4}),
    ],
)
def test_frames_of_a_file_by_options_of_the_call_and_of_the_processor(family, own, options, how):
    config, processor = tiny_config(family), tiny_processor(family)
    meta = VideoMetadata(total_num_frames=390, fps=30000 / 1001)
    for name, value in own.items():
        setattr(processor.video_processor, name, value)
    (video,) = Preparer(processor, config, family_of(config))(QUESTION, videos=NASA, **options).videos
    clean = tiny_processor(family).video_processor if how else processor.video_processor
    assert [round(t * video.fps) for t in video.times_s] == np.asarray(clean.sample_frames(meta, **how)).tolist()


def test_the_shift_of_internvl():
    config, processor = tiny_config("internvl"), tiny_processor("internvl")
    prepare = Preparer(processor, config, family_of(config))
    (video,) = prepare(QUESTION, videos=NASA, num_frames=5, initial_shift=False).videos
    assert [round(t * video.fps) for t in video.times_s] == [0, 78, 156, 234, 312]


@pytest.mark.parametrize("family", ["llava_onevision", "internvl"])
def test_all_frames_of_a_long_video_are_not_taken_unasked(family):
    sampler = frame_sampler(tiny_processor(family).video_processor, {"do_sample_frames": False})
    assert len(sampler(768, 30.0)) == 768
    with pytest.raises(
        InputError, match="takes all frames of a video, here 769: give fps=, num_frames= or max_frames="
    ):
        sampler(769, 30.0)
    for fps in (1e9, 60):
        with pytest.raises(InputError, match="cannot sample 100 frames at 30 a second with fps="):
            frame_sampler(tiny_processor(family).video_processor, {}, fps=fps)(100, 30.0)


def test_a_processor_without_sampling_has_no_sampler():
    assert frame_sampler(SimpleNamespace(), {}) is None
    none = processor_in_effect(SimpleNamespace(), {"images_kwargs": {}, "videos_kwargs": {}})
    assert not vars(none.image_processor) and not vars(none.video_processor)

"""`prepare` with videos: files and frames, their times, several of them in one sample or batch, and errors."""

import logging
from pathlib import Path

import pytest
import torch
from transformers.video_utils import VideoMetadata

from helpers.preparers import QUESTION, model, preparer, same
from helpers.tiny import tiny_frames, tiny_image, tiny_processor
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.preparer import Preparer
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.inputs.video import Video
from hooked_mllm.layout import Frames

NASA = Path(__file__).parents[1] / "data" / "nasa_13013.mp4"


def frames_in_text(prepare: Preparer, sample: Sample) -> str:
    return prepare.tokenizer.decode(sample.inputs["input_ids"][0])


def test_a_file_gives_the_inputs_of_its_frames(family):
    prepare = preparer(family)
    sample = prepare(QUESTION, videos=NASA, num_frames=5)
    (video,) = sample.videos
    assert (len(video), video.width) == (5, 480)
    processor, config = tiny_processor(family), {} if family != "qwen3_vl" else {"cap_pixels_per_frame": False}
    content = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    numbers = [round(t * 30000 / 1001) for t in video.times_s]
    meta = [VideoMetadata(total_num_frames=390, fps=30000 / 1001, frames_indices=numbers)]
    clip = [video.frames.transpose(0, 3, 1, 2)]
    expected = processor(
        text=[text], videos=clip, video_metadata=meta, do_sample_frames=False, return_tensors="pt", **config
    )
    same(sample.inputs, expected)
    assert sample.layout.items[0].times_s == video.times_s


def test_the_prompt_of_qwen_has_the_real_times():
    prepare = preparer("qwen3_vl")
    even = prepare(QUESTION, videos=[(tiny_frames(4), 0.5)])
    assert "<1.0 seconds>" in frames_in_text(prepare, even)
    assert "<5.0 seconds>" in frames_in_text(prepare, even)
    uneven = Video.from_frames(tiny_frames(4), times_s=[0, 0.4, 7.25, 9.25])
    text = frames_in_text(prepare, prepare(QUESTION, videos=uneven))
    assert "<0.2 seconds>" in text
    assert "<8.2 seconds>" in text


def test_preparing_twice_gives_the_same(family):
    # Qwen3-VL's processor appends to the list of frame numbers that it is given
    video = Video.from_frames(tiny_frames(5), fps=2)
    first = preparer(family)(QUESTION, videos=video)
    same(preparer(family)(QUESTION, videos=video).inputs, first.inputs)
    assert video.times_s == (0, 0.5, 1, 1.5, 2)


def test_images_come_before_videos_before_the_question(family):
    clips = [(tiny_frames(4, seed=1), 2.0), (tiny_frames(4, width=16, seed=2), 1.0)]
    sample = preparer(family)(QUESTION, images=[tiny_image(), tiny_image(20, 20)], videos=clips)
    layout = sample.layout
    assert [item.name for item in layout.items] == ["image 0", "image 1", "video 0", "video 1"]
    order = [*(layout.item == n for n in range(4)), layout.question]
    starts = [int(mask.nonzero()[0]) for mask in order]
    assert starts == sorted(starts)
    assert layout.items[3].width == 16
    with torch.no_grad():
        assert torch.isfinite(model(family)(**sample.inputs).logits).all()


def test_unequal_videos_of_one_sample():
    clips = [(tiny_frames(4), 2.0), (tiny_frames(6), 2.0)]
    assert len(preparer("qwen3_vl")(QUESTION, videos=clips).layout.items) == 2
    for family in ("llava_onevision", "internvl"):
        with pytest.raises(InputError, match=r"videos have \[4, 6\] frames: .*num_frames="):
            preparer(family)(QUESTION, videos=clips)


def test_unequal_videos_in_a_batch():
    clips = [(tiny_frames(4), 2.0), (tiny_frames(6), 2.0)]
    for family in ("qwen3_vl", "internvl"):
        with torch.no_grad():
            assert len(model(family)(**preparer(family)([QUESTION] * 2, videos=clips).inputs).logits) == 2
    with pytest.raises(InputError, match=r"'pixel_values_videos' cannot be joined in one batch.*num_frames="):
        preparer("llava_onevision")([QUESTION] * 2, videos=clips)


def test_nothing_is_logged(family):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        preparer(family)([QUESTION] * 2, images=[tiny_image()] * 2, videos=[NASA, (tiny_frames(3), 1.0)], num_frames=3)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_a_target_in_a_video(family):
    sample = preparer(family)(QUESTION, videos=[(tiny_frames(6), 1.0)], target=Frames(2, 3))
    frames = sample.layout.frame_range[sample.mask("target")[0]]
    assert frames.unique().tolist() == [2, 3]


def test_frames_with_no_fps(family):
    with pytest.raises(InputError, match="Frames in memory carry no times: give fps="):
        preparer(family)(QUESTION, videos=tiny_frames(4))
    assert preparer(family)(QUESTION, videos=tiny_frames(4), fps=2).videos[0].times_s == (0, 0.5, 1, 1.5)


def test_a_video_that_does_not_decode_or_has_no_file(family, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"\0" * 2000)
    with pytest.raises(InputError, match="does not decode"):
        preparer(family)(QUESTION, videos=tmp_path / "bad.mp4")
    with pytest.raises(InputError, match="No video file"):
        preparer(family)(QUESTION, videos=str(tmp_path / "none.mp4"))

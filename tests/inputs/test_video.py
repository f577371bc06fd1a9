"""Video files: the right stream, the right frames, their real times; and clear words where that cannot be had."""

import inspect
import tracemalloc

import av
import numpy as np
import pytest
import torch
from transformers import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from helpers.tiny import tiny_frames, tiny_image
from helpers.videos import NASA, grey, write
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.video import Video, as_video, read_video, sampled


@pytest.mark.parametrize("total", [1, 3, 5, 97, 390, 4000, 60_000])
@pytest.mark.parametrize("rate", [1.0, 10.0, 30000 / 1001, 60.0])
@pytest.mark.parametrize("fps", [None, 0.5, 2, 3.7, 1e9])
def test_frames_by_rate_are_those_of_qwens_processor(total, rate, fps):
    theirs = Qwen3VLVideoProcessor().sample_frames(VideoMetadata(total_num_frames=total, fps=rate), fps=fps)
    assert sampled(total, rate, fps).tolist() == theirs.tolist()


@pytest.mark.parametrize("count", [1, 2, 7, 390])
def test_frames_by_number_are_those_of_qwens_processor(count):
    theirs = Qwen3VLVideoProcessor().sample_frames(VideoMetadata(total_num_frames=390, fps=30), num_frames=count)
    assert sampled(390, 30.0, num_frames=count).tolist() == theirs.tolist()


def test_max_frames_is_a_limit_of_the_whole_video():
    assert sampled(1000, 10.0, fps=5, max_frames=11).tolist() == np.linspace(0, 999, 11).round().tolist()
    assert sampled(1000, 10.0, fps=1, max_frames=11).tolist() == np.linspace(0, 999, 11).round().tolist()
    assert sampled(1000, 10.0, fps=0.5, max_frames=60).tolist() == np.linspace(0, 999, 50).round().tolist()
    assert sampled(2, 10.0, num_frames=9).tolist() == [0, 1]


def test_limits_apply_before_memory_is_taken(monkeypatch):
    tracemalloc.start()
    assert len(sampled(10**6, 30.0, fps=1e12)) == 768
    assert len(read_video(NASA, fps=1e9, max_frames=3)) == 3
    assert tracemalloc.get_traced_memory()[1] < 100 * 2**20
    tracemalloc.stop()
    monkeypatch.setattr("hooked_mllm.inputs.video.MAX_VIDEO_BYTES", 10 * 480 * 270 * 3)
    assert len(read_video(NASA, num_frames=10)) == 10
    with pytest.raises(InputError, match=r"11 frames of .* would take 0\.0 GiB, more than 0\.0: take fewer with fps="):
        read_video(NASA, num_frames=11)


def test_frames_in_memory_are_not_sampled():
    for name in ("num_frames", "max_frames"):
        with pytest.raises(InputError, match=f"{name}=3 is for video files, and this video is 4 frames in memory"):
            as_video((tiny_frames(4), 2.0), **{name: 3})
    assert len(as_video((tiny_frames(4), 2.0), num_frames=4)) == 4


def test_a_video_that_decodes_black_is_rejected(tmp_path):
    path = write(tmp_path / "black.mp4", [grey(0)] * 6)
    with pytest.raises(InputError, match=r"decodes black: no pixel of the 3 frames"):
        read_video(path, num_frames=3)
    dark = write(tmp_path / "dark.mp4", [grey(0)] * 3 + [grey(60)] * 3)
    assert len(read_video(dark, num_frames=6)) == 6


def test_sound_without_pictures_is_rejected(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="has no video stream"):
        read_video(tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"fps": 1, "num_frames": 2}, "not both; got fps=1, num_frames=2"),
        ({"fps": 0}, "fps must be positive; got 0"),
        ({"num_frames": -1}, "num_frames must be positive"),
        ({"max_frames": 0}, "max_frames must be positive"),
    ],
)
def test_contradictory_sampling_is_rejected(kwargs, message):
    with pytest.raises(InputError, match=message):
        read_video(NASA, **kwargs)


def test_no_file_and_an_address_are_rejected(tmp_path):
    with pytest.raises(InputError, match="No video file at"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="not from addresses"):
        read_video("https://somewhere/a.mp4")


def test_frames_with_no_fps_are_rejected():
    for frames in (tiny_frames(4), [tiny_image(), tiny_image()]):
        with pytest.raises(InputError, match="Frames in memory carry no times: give fps="):
            as_video(frames)
        with pytest.raises(InputError, match="Frames in memory carry no times"):
            Video.from_frames(frames)
    with pytest.raises(InputError, match="fps must be positive"):
        as_video(tiny_frames(4), fps=0)


@pytest.mark.parametrize("form", ["array", "chw", "float", "tensor", "pictures", "pair", "video"])
def test_every_form_of_frames_gives_the_same_video(form):
    frames = tiny_frames(4)
    fps = None if form in ("pair", "video") else 2
    forms = {
        "array": frames,
        "chw": frames.transpose(0, 3, 1, 2),
        "float": frames / 255,
        "tensor": torch.from_numpy(frames),
        "pictures": list(frames),
        "pair": (frames, 2.0),
        "video": Video.from_frames(frames, times_s=[0, 0.5, 1, 1.5]),
    }
    video = as_video(forms[form], fps=fps)
    assert np.array_equal(video.frames, frames)
    assert video.times_s == (0.0, 0.5, 1.0, 1.5)
    assert video.fps == 2


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.full((2, 4, 6, 3), np.nan), "NaN or infinity"),
        (np.zeros((4, 6, 3), np.uint8), "frames of a video are an array"),
        ([tiny_image(8, 8), tiny_image(8, 6)], "one size; got"),
        ([], "one picture or more"),
        (7, "A video is a path"),
    ],
)
def test_what_is_no_video_is_rejected(frames, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(as_video)(frames, fps=1)


def test_times_must_increase():
    for times in ([0, 0], [1, 0], [0, float("nan")]):
        with pytest.raises(InputError, match="finite and increasing"):
            Video.from_frames(tiny_frames(2), times_s=times)
    with pytest.raises(InputError, match="one time for each frame; got 2 frames and 3 times"):
        Video.from_frames(tiny_frames(2), times_s=[0, 1, 2])


@pytest.mark.parametrize("frames", [[], [5], [-1], [0.5], [True, False], [[0, 1]], "01", None, 3])
def test_frames_of_a_sampler_are_checked(tmp_path, frames):
    path = tmp_path / "grey.mp4"
    write(path, [grey(60 + 40 * i) for i in range(5)])
    assert len(read_video(path, sampler=lambda total, rate: [0, total - 1])) == 2
    with pytest.raises(InputError, match=r"sampler="):
        read_video(path, sampler=lambda total, rate: frames)

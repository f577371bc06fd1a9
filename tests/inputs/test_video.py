"""Video files: the right stream, the right frames, their real times; and clear words where that cannot be had."""

import inspect
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from helpers.tiny import tiny_frames, tiny_image
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.video import Video, as_video, read_video, sampled

NASA = Path(__file__).parents[1] / "data" / "nasa_13013.mp4"


def grey(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


def write(path, frames, rate=10, stamps=None, size=None, gop=4, rotation=0):
    """Frames [height width 3] into a file, at 1/rate seconds each or at the times given in units of 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", gop, 2_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(video: Video) -> list[int]:
    return [round(float(f.mean())) for f in video.frames]


def test_the_largest_stream_is_taken_not_the_first():
    with av.open(str(NASA)) as container:
        first, sizes = container.streams.video[0], {(s.width, s.height) for s in container.streams.video}
    video = read_video(NASA, num_frames=4)
    assert (first.width, first.height) == (320, 180)
    assert (video.width, video.height) == (480, 270) == max(sizes)
    assert video.fps == pytest.approx(30000 / 1001)
    assert video.times_s == pytest.approx([0, 130 / video.fps, 259 / video.fps, 389 / video.fps], abs=1e-3)


def test_frames_are_those_of_a_plain_decode():
    with av.open(str(NASA)) as container:
        stream = container.streams.video[1]
        assert (stream.width, stream.height) == (480, 270)
        decoded = [(float(f.pts * f.time_base), f) for f in container.decode(stream)]
        video = read_video(NASA, fps=1.5)
        for time, pixels in zip(video.times_s, video.frames, strict=True):
            at = np.argmin([abs(t - decoded[0][0] - time) for t, _ in decoded])
            assert np.array_equal(decoded[at][1].to_ndarray(format="rgb24"), pixels)


def test_each_time_shows_the_frame_on_screen_then(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(20 * i + 20) for i in range(10)], rate=10)
    video = read_video(path, fps=4)
    # 0, 0.25, 0.5, 0.75 s: frames 0, 2, 5, 7 are on screen
    assert video.times_s == pytest.approx([0, 0.2, 0.5, 0.7])
    assert levels(video) == pytest.approx([20, 60, 120, 160], abs=3)


def test_uneven_frame_times_are_kept(tmp_path):
    stamps = [0, 40, 1000, 1040, 3000]
    path = write(tmp_path / "a.mkv", [grey(40 * i + 40) for i in range(5)], rate=25, stamps=stamps)
    video = read_video(path, num_frames=5)
    assert video.times_s == pytest.approx([s / 1000 for s in stamps])
    assert levels(video) == pytest.approx([40, 80, 120, 160, 200], abs=3)
    assert read_video(path, fps=1).times_s == pytest.approx([0, 1, 1.04, 3])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_jumping_between_key_frames_finds_the_same_frames(tmp_path, suffix):
    frames = [grey(20 + 2 * i) for i in range(100)]
    path = write(tmp_path / f"a.{suffix}", frames, rate=10, gop=5)
    everything, few = read_video(path, num_frames=100), read_video(path, num_frames=4)
    assert len(everything) == 100
    assert everything.times_s[0] == 0
    assert everything.times_s[-1] == pytest.approx(9.9, abs=0.01)
    assert few.times_s == pytest.approx([0, 3.3, 6.6, 9.9], abs=0.01)
    assert np.array_equal(few.frames, everything.frames[[0, 33, 66, 99]])


def test_a_rotation_noted_in_the_file_is_applied(tmp_path):
    frames = np.stack([grey(40)] * 4)
    frames[:, :, :32] = 220  # the left half is bright
    turned = read_video(write(tmp_path / "a.mp4", list(frames), rotation=90), num_frames=2)
    plain = read_video(write(tmp_path / "b.mp4", list(frames)), num_frames=2)
    with av.open(str(tmp_path / "a.mp4")) as container:
        angle = next(container.decode(video=0)).rotation
    assert abs(angle) == 90
    assert (turned.width, turned.height) == (plain.height, plain.width)
    assert np.array_equal(turned.frames, np.rot90(plain.frames, angle // 90, axes=(1, 2)))


def test_max_frames_spreads_over_the_whole():
    times = np.arange(1000) / 10
    some = sampled(times, fps=5, max_frames=11)
    assert len(some) == 11
    assert (some[0], some[-1]) == (0, 998)
    assert len(sampled(times)) == 200
    assert sampled(times, num_frames=3).tolist() == [0, 500, 999]
    assert sampled(times[:2], num_frames=9).tolist() == [0, 1]
    assert sampled(times, fps=1000, max_frames=10**6).tolist() == list(range(1000))


def test_a_video_that_decodes_black_is_refused(tmp_path):
    path = write(tmp_path / "black.mp4", [grey(0)] * 6)
    with pytest.raises(InputError, match=r"decodes black: no pixel of the 3 frames"):
        read_video(path, num_frames=3)
    dark = write(tmp_path / "dark.mp4", [grey(0)] * 3 + [grey(60)] * 3)
    assert len(read_video(dark, num_frames=6)) == 6


def test_a_video_that_does_not_decode_is_refused(tmp_path):
    whole = write(tmp_path / "a.mp4", list(tiny_frames(40, 64, 48)), gop=4).read_bytes()
    (tmp_path / "head.mp4").write_bytes(whole[:2000])  # the index of an mp4 stands at its end
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    for name in ("head.mp4", "text.mp4"):
        with pytest.raises(InputError, match="does not decode"):
            read_video(tmp_path / name)


def test_garbage_inside_an_intact_container_is_refused(tmp_path):
    data = bytearray(write(tmp_path / "a.mp4", list(tiny_frames(40, 64, 48))).read_bytes())
    body = data.index(b"mdat") + 4
    index = data.index(b"moov")
    data[body : index - 4] = bytes(index - 4 - body)
    (tmp_path / "zeros.mp4").write_bytes(bytes(data))
    with pytest.raises(InputError, match="does not decode"):
        read_video(tmp_path / "zeros.mp4", num_frames=4)


def test_a_file_cut_off_on_the_way_is_refused_only_where_it_matters(tmp_path):
    whole = write(tmp_path / "a.ts", list(tiny_frames(80, 64, 48)), gop=4).read_bytes()
    (tmp_path / "half.ts").write_bytes(whole[: len(whole) // 2])
    video = read_video(tmp_path / "half.ts", num_frames=8)
    assert 3 < video.times_s[-1] < 4.5  # what is left of 8 s


def test_sound_without_pictures_is_refused(tmp_path):
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
def test_contradictory_sampling_is_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        read_video(NASA, **kwargs)


def test_no_file_and_an_address_are_refused(tmp_path):
    with pytest.raises(InputError, match="No video file at"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="not from addresses"):
        read_video("https://somewhere/a.mp4")


def test_frames_with_no_fps_are_refused():
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
def test_what_is_no_video_is_refused(frames, message):
    with pytest.raises(InputError, match=message):
        inspect.unwrap(as_video)(frames, fps=1)


def test_times_must_increase():
    for times in ([0, 0], [1, 0], [0, float("nan")]):
        with pytest.raises(InputError, match="finite and increasing"):
            Video.from_frames(tiny_frames(2), times_s=times)
    with pytest.raises(InputError, match="one time for each frame; got 2 frames and 3 times"):
        Video.from_frames(tiny_frames(2), times_s=[0, 1, 2])

"""Selected frames of a file against a plain decode of all of them, and files that do not decode."""

from fractions import Fraction

import av
import numpy as np
import pytest

from helpers.tiny import tiny_frames
from helpers.videos import NASA, grey, levels, write
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.video import read_video


def test_the_largest_stream_is_read_not_the_first():
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


def test_frames_have_the_time_at_which_they_are_shown(tmp_path):
    path = write(tmp_path / "a.mp4", [grey(20 * i + 20) for i in range(10)], rate=10)
    video = read_video(path, fps=4)
    # one second at four frames a second: four of the ten, evenly spaced
    assert video.times_s == pytest.approx([0, 0.3, 0.6, 0.9])
    assert levels(video) == pytest.approx([20, 80, 140, 200], abs=3)


def test_uneven_frame_times_are_kept(tmp_path):
    stamps = [0, 40, 1000, 1040, 3000]
    path = write(tmp_path / "a.mkv", [grey(40 * i + 40) for i in range(5)], rate=25, stamps=stamps)
    video = read_video(path, num_frames=5)
    assert video.times_s == pytest.approx([s / 1000 for s in stamps])
    assert levels(video) == pytest.approx([40, 80, 120, 160, 200], abs=3)
    assert read_video(path, num_frames=3).times_s == pytest.approx([0, 1, 3])
    assert video.fps == pytest.approx(4 / 3)  # the header states 25


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


def test_a_video_that_does_not_decode_is_rejected(tmp_path):
    whole = write(tmp_path / "a.mp4", list(tiny_frames(40, 64, 48)), gop=4).read_bytes()
    (tmp_path / "head.mp4").write_bytes(whole[:2000])  # the index of an mp4 stands at its end
    (tmp_path / "text.mp4").write_text("not a video" * 100)
    for name in ("head.mp4", "text.mp4"):
        with pytest.raises(InputError, match="does not decode"):
            read_video(tmp_path / name)


def test_garbage_inside_an_intact_container_is_rejected(tmp_path):
    data = bytearray(write(tmp_path / "a.mp4", list(tiny_frames(40, 64, 48))).read_bytes())
    body = data.index(b"mdat") + 4
    index = data.index(b"moov")
    data[body : index - 4] = bytes(index - 4 - body)
    (tmp_path / "zeros.mp4").write_bytes(bytes(data))
    with pytest.raises(InputError, match="does not decode"):
        read_video(tmp_path / "zeros.mp4", num_frames=4)


def test_a_file_cut_off_on_the_way_is_rejected_only_where_it_matters(tmp_path):
    whole = write(tmp_path / "a.ts", list(tiny_frames(80, 64, 48)), gop=4).read_bytes()
    (tmp_path / "half.ts").write_bytes(whole[: len(whole) // 2])
    video = read_video(tmp_path / "half.ts", num_frames=8)
    assert 3 < video.times_s[-1] < 4.5  # what is left of 8 s


@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
@pytest.mark.parametrize(
    ("suffix", "options"),
    [("mp4", {"movflags": "faststart"}), ("mp4", {"movflags": "frag_keyframe+empty_moov"}), ("mkv", {}), ("avi", {})],
)
def test_a_file_cut_off_is_rejected(tmp_path, suffix, options, share):
    whole = write(tmp_path / f"a.{suffix}", list(tiny_frames(40, 64, 48)), options=options)
    assert len(read_video(whole, num_frames=40)) == 40
    data = whole.read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"cut off or (damaged|its header is wrong)"):
        read_video(tmp_path / f"cut.{suffix}", num_frames=2)


def test_a_header_that_states_more_frames_than_there_are(tmp_path):
    data = bytearray(write(tmp_path / "a.avi", list(tiny_frames(20, 64, 48))).read_bytes())
    length = data.index(b"strh") + 8 + 32  # dwLength of the stream header
    assert int.from_bytes(data[length : length + 4], "little") == 20
    data[length : length + 4] = (500).to_bytes(4, "little")
    (tmp_path / "lies.avi").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"states 50\.00 s of frames, and the file has 20 frames up to 2\.00 s"):
        read_video(tmp_path / "lies.avi")


def test_a_header_with_another_frame_rate_gives_a_warning(tmp_path):
    path = write(tmp_path / "a.mkv", [grey(10 * i + 10) for i in range(20)], rate=50, stamps=range(0, 4000, 200))
    with pytest.warns(UserWarning, match="states 50 frames a second, its time stamps 5: the time stamps are used"):
        video = read_video(path, fps=2)
    assert video.fps == 5
    assert video.times_s == pytest.approx(np.linspace(0, 19, 8).round() / 5)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov", "wmv", "ts"])
def test_sound_after_the_last_frame_and_a_late_first_frame_are_no_damage(tmp_path, suffix):
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        pictures = container.add_stream("wmv2" if suffix == "wmv" else "mpeg4", rate=10)
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        sound = container.add_stream("mp2" if suffix in ("avi", "wmv", "ts") else "aac", rate=48000, layout="mono")
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(grey(20 * i + 20), format="rgb24")
            frame.pts, frame.time_base = i + 5 * (suffix != "avi"), Fraction(1, 10)  # AVI has no late start
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        size, kind = (1152, "s16") if sound.name == "mp2" else (1024, "fltp")
        for i in range(200):  # four seconds
            data = np.zeros((1, size), np.int16 if kind == "s16" else np.float32)
            samples = av.AudioFrame.from_ndarray(data, format=kind, layout="mono")
            samples.sample_rate, samples.pts = 48000, i * size
            container.mux(sound.encode(samples))
        container.mux(sound.encode())
    video = read_video(tmp_path / f"a.{suffix}", num_frames=100)
    assert len(video) == 8
    assert video.times_s == pytest.approx(np.arange(8) / 10, abs=0.01)

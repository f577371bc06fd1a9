"""Videos as arrays of frames with their real times: from files, or from frames in memory."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from hooked_mllm.checks import checked, numbers
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.images import ImageInput, channels_last, existing_file, load_image, media_list, to_uint8

#: Qwen3-VL's own sampling, the default of `read_video`
DEFAULT_FPS, DEFAULT_MIN_FRAMES, DEFAULT_MAX_FRAMES = 2.0, 4, 768
#: frames decoded from one file take at most this many bytes
MAX_VIDEO_BYTES = 8 * 2**30

#: (number of frames, frames a second) -> numbers of the frames to take
Sampler = Callable[[int, float], np.ndarray]
Number = float | int | np.floating | np.integer
#: frames in memory: `[frame height width channel]`, `[frame channel height width]`, or pictures of one size
FrameInput = np.ndarray | Tensor | Sequence[ImageInput]


@checked
@dataclass(frozen=True, eq=False)
class Video:
    """The frames that are given to a model, and the time of each.

    Attributes:
        frames: uint8 RGB, `[frame height width channel]`.
        times_s: The time of each frame in seconds, from the start of the video.
        fps: Frame rate of the video that they were taken from.
        source: Where they come from, for messages.

    Examples:
        >>> import numpy as np
        >>> Video.from_frames(np.zeros((4, 8, 6, 3), dtype=np.uint8), fps=2)
        Video(4 frames of 6x8 px, 0 to 1.5 s, frames in memory)
    """

    frames: UInt8[np.ndarray, "frame height width 3"]
    times_s: tuple[float, ...]
    fps: float
    source: str = "frames in memory"

    def __post_init__(self) -> None:
        if len(self.times_s) != len(self.frames):
            raise InputError(
                f"A video needs one time for each frame; got {len(self.frames)} frames and {len(self.times_s)} times."
            )
        if not len(self.frames):
            raise InputError("A video needs one frame at least; got none.")
        if not all(np.isfinite(self.times_s)) or any(np.diff(self.times_s) <= 0):
            raise InputError("The times of a video's frames must be finite and increasing.")

    @classmethod
    def from_frames(
        cls,
        frames: FrameInput,
        fps: Number | None = None,
        times_s: Sequence[Number] | None = None,
        source: str = "frames in memory",
    ) -> "Video":
        """Frames in memory with their frame rate, or with a time in seconds for each.

        Args:
            frames: `[frame height width channel]` or `[frame channel height width]`, integers to 255 or floats to 1;
                or a list of pictures of one size.
            fps: Frames a second, of these very frames.
            times_s: Instead of `fps`, for frames at uneven distances.
            source: A name for messages.

        Raises:
            InputError: Neither `fps` nor `times_s`, frames of unequal sizes, NaN.
        """
        if (fps is None) == (times_s is None):
            raise InputError(
                "Frames in memory carry no times: give fps= (frames a second, of these very frames), or times_s= with "
                f"one time for each; got fps={fps}, times_s={times_s}."
            )
        if fps is not None:
            _check_positive("fps", fps)
        pixels = _stack(frames)
        if fps is not None:
            return cls(pixels, tuple(i / float(fps) for i in range(len(pixels))), float(fps), source)
        times = numbers(times_s, "times_s")
        length = float(times[-1] - times[0]) if len(times) > 1 else 0.0
        return cls(pixels, tuple(times.tolist()), (len(times) - 1) / length if length > 0 else 1.0, source)

    @property
    def width(self) -> int:
        """In pixels."""
        return self.frames.shape[2]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.frames.shape[1]

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        span = f"{self.times_s[0]:g} to {self.times_s[-1]:g} s"
        return f"Video({len(self)} frames of {self.width}x{self.height} px, {span}, {self.source})"


@checked
def read_video(
    path: str | os.PathLike[str],
    fps: Number | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    sampler: Sampler | None = None,
) -> Video:
    """Frames of a video file, from its largest video stream, upright, each with its time in seconds from the first.

    The frames are those of Qwen3-VL's processor: evenly spaced, the first and the last included. `prepare` takes those
    of the model's own processor.

    Args:
        path: The file.
        fps: Frames for each second of the video; in all at least 4 (2 if `num_frames` is not given either).
        num_frames: Take that many frames; all if the video has fewer.
        max_frames: With `fps`, the most frames (768 by default).
        sampler: Gives the numbers of the frames to take (integers from 0, below the number of frames) from the number
            of frames and their rate, instead of the above.

    Raises:
        InputError: No such file, no video in it, a file that is cut off, frames that do not decode, more than 8 GiB of
            frames, or nothing but black.
    """
    check_sampling(fps, num_frames, max_frames)
    file = existing_file(path, "video")

    from hooked_mllm.inputs.video_decoder import decode  # PyAV is loaded only where a file is read

    def choose(total: int, rate: float) -> np.ndarray:
        if sampler is None:
            return sampled(total, rate, fps, num_frames, max_frames)
        selected = sampler(total, rate)
        index = numbers(selected, "the frames of sampler=")
        whole = np.asarray(selected).dtype.kind in "iu" and index.ndim == 1 and len(index) > 0
        if not whole or index.min() < 0 or index.max() >= total:
            raise InputError(
                f"Expected integers from 0 to {total - 1}, at least one, from sampler={sampler!r}; got {selected!r}."
            )
        return index.astype(int)

    frames, times, rate = decode(file, choose, MAX_VIDEO_BYTES)
    if frames.max() <= _BLACK:
        raise InputError(
            f"{str(path)!r} decodes black: no pixel of the {len(frames)} frames taken is brighter than {_BLACK} of "
            "255. Check that the file plays, or take other frames with fps= or num_frames=."
        )
    return Video(frames, tuple(float(t) for t in times), rate, file.name)


# compression leaves a few levels of noise on pure black
_BLACK = 10


def sampled(
    total: int,
    rate: float,
    fps: Number | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
) -> np.ndarray:
    """Numbers of the frames to take of `total`, at `rate` frames a second; see `read_video`."""
    if num_frames is None:
        most = DEFAULT_MAX_FRAMES if max_frames is None else max_frames
        num_frames = min(max(int(min(total / rate * (fps or DEFAULT_FPS), most)), DEFAULT_MIN_FRAMES), most)
    return np.linspace(0, total - 1, min(num_frames, total)).round().astype(int)


def check_sampling(fps: Number | None, num_frames: int | None, max_frames: int | None) -> None:
    """Raise an InputError for contradictory options, or numbers that are not positive."""
    if fps is not None and num_frames is not None:
        raise InputError(f"Give fps= or num_frames=, not both; got fps={fps}, num_frames={num_frames}.")
    for name, value in (("fps", fps), ("num_frames", num_frames), ("max_frames", max_frames)):
        if value is not None:
            _check_positive(name, value)


#: one video: a path, a `Video`, frames (with `fps=`), or a pair (frames, fps)
VideoInput = str | os.PathLike[str] | Video | FrameInput | tuple[FrameInput, Number]
#: one video, or several; an array of five axes is several
Videos = VideoInput | Sequence[VideoInput]


def as_video(
    video: VideoInput,
    fps: Number | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    sampler: Sampler | None = None,
) -> Video:
    """One video in any form that `prepare` takes; `fps` is the rate of frames in memory.

    Files are sampled; a `Video` contains the frames that the model receives.
    """
    if isinstance(video, str | os.PathLike):
        return read_video(video, fps, num_frames, max_frames, sampler)
    if isinstance(video, Video):
        return video
    if _is_pair(video):
        loaded = Video.from_frames(video[0], fps=video[1])
    elif isinstance(video, np.ndarray | Tensor) or (isinstance(video, Sequence) and not isinstance(video, bytes)):
        loaded = Video.from_frames(cast("FrameInput", video), fps=fps)
    else:
        raise InputError(
            "A video is a path, a Video, an array of frames with fps=, or a pair (frames, fps); got "
            f"{type(video).__name__}."
        )
    for name, most in (("num_frames", num_frames), ("max_frames", max_frames)):
        if most is not None and len(loaded) > most:
            raise InputError(
                f"{name}={most} is for video files, and this video is {len(loaded)} frames in memory, which are given "
                "to the model as they are: select the frames before, as in frames[::2]."
            )
    return loaded


def as_list(videos: Videos | None) -> list[Any]:
    """One video or a list of them, as a list; `None` gives an empty one."""
    return [videos] if _is_pair(videos) else media_list(videos, Video, 4, "video")


def _is_pair(video: object) -> TypeGuard[tuple[FrameInput, Number]]:
    return isinstance(video, tuple) and len(video) == 2 and isinstance(video[1], Number)


def _stack(frames: FrameInput) -> UInt8[np.ndarray, "frame height width 3"]:
    if not isinstance(frames, np.ndarray | Tensor):
        if isinstance(frames, Image.Image) or not len(frames):
            raise InputError(
                "The frames of a video are a list of one picture or more, or an array [frame height width channel]."
            )
        pictures = [np.asarray(load_image(f)) for f in frames]
        sizes = {p.shape[:2] for p in pictures}
        if len(sizes) > 1:
            raise InputError(f"The frames of a video have one size; got [height width] of {sorted(sizes)}.")
        return np.stack(pictures)
    if frames.ndim != 4 or 0 in frames.shape:
        raise InputError(
            "The frames of a video are an array [frame height width channel] or [frame channel height width]; got "
            f"shape {tuple(frames.shape)}. Several videos go into a list."
        )
    pixels = channels_last(to_uint8(frames, "A video"), "A video")
    if pixels.shape[-1] == 3:
        return np.ascontiguousarray(pixels)
    return np.stack([np.asarray(load_image(p)) for p in pixels])


def _check_positive(name: str, value: Number) -> None:
    if not value > 0 or not np.isfinite(value):
        raise InputError(f"{name} must be positive; got {value}.")

"""Decoding selected frames of a video file with PyAV."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from hooked_mllm.errors import InputError


class _Missed(Exception):
    """A seek that ended after the frame it was for."""


def decode(path: Path, choose: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """The frames that `choose` selects by the times of all, their times in seconds from the first, and their rate.

    The first reading collects the packets' time stamps; the second skips groups of pictures without selected frames.
    """
    try:
        with av.open(str(path)) as container:
            stream = _largest(container, path)
            stamps, keys = _stamps(container, stream)
            base, rate = stream.time_base or Fraction(1), stream.average_rate
        if not len(stamps):
            raise InputError(f"{str(path)!r} has a video stream without a single frame: the file does not decode.")
        times = (stamps - stamps[0]) * float(base)
        selected = stamps[choose(times)]
        try:
            pixels = _frames(path, selected, keys)
        except _Missed:
            pixels = _frames(path, selected, keys[:1])
    except (av.FFmpegError, OSError) as error:  # av.FFmpegError covers damage, OSError a file that cannot be opened
        raise InputError(f"{str(path)!r} does not decode as a video: {error}") from error
    # a decoded frame may lie a few frames from the selected time, and no farther
    near = max(1, int(np.median(np.diff(stamps)))) * 4 if len(stamps) > 1 else 1
    lost = [stamp for stamp in selected.tolist() if not any(abs(decoded - stamp) <= near for decoded in pixels)]
    if lost:
        at = ", ".join(f"{(stamp - stamps[0]) * float(base):.2f}" for stamp in lost[:4])
        raise InputError(
            f"{str(path)!r} does not decode: {len(lost)} of the {len(selected)} selected frames are missing (at {at} "
            "s). The file is cut off or damaged."
        )
    order = sorted(pixels)
    sizes = {pixels[stamp].shape[:2] for stamp in order}
    if len(sizes) > 1:
        raise InputError(f"{str(path)!r} has frames of several sizes: {sorted(sizes)}.")
    times = (np.asarray(order) - stamps[0]) * float(base)
    fps = float(rate) if rate else (len(stamps) - 1) / max(float((stamps[-1] - stamps[0]) * base), 1e-9)
    return np.stack([pixels[stamp] for stamp in order]), times.clip(0), fps


def _largest(container: InputContainer, path: Path) -> av.VideoStream:
    """The stream with most pixels; the first of equals. Cover pictures (streams of one frame) do not count."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise InputError(f"{str(path)!r} has no video stream.")
    return max(streams, key=lambda s: s.width * s.height)


def _stamps(container: InputContainer, stream: av.VideoStream) -> tuple[np.ndarray, np.ndarray]:
    """Time stamps of all frames, and of those at which decoding can start, in order of display."""
    stamps, keys = [], []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None or packet.size == 0 or packet.is_discard:
            continue
        stamps.append(stamp)
        if packet.is_keyframe:
            keys.append(stamp)
    return np.unique(np.asarray(stamps, np.int64)), np.unique(np.asarray(keys, np.int64))


def _frames(path: Path, selected: np.ndarray, keys: np.ndarray) -> dict[int, np.ndarray]:
    """Time stamp -> pixels of the frame nearest to each selected stamp."""
    pixels: dict[int, np.ndarray] = {}
    with av.open(str(path)) as container:
        stream = _largest(container, path)
        stream.thread_type = "AUTO"
        # selected stamps by the key frame that decoding them starts from
        group = np.searchsorted(keys, selected, side="right") - 1
        for run in np.split(np.arange(len(selected)), np.flatnonzero(np.diff(group) > 1) + 1):
            key = max(0, int(group[run[0]]))
            jumped = bool(run[0] > 0 or key > 0)
            if jumped:
                container.seek(int(keys[key]), stream=stream)
            _collect(container.decode(stream), selected[run].tolist(), pixels, jumped)
    return pixels


def _collect(frames: Iterator[av.VideoFrame], selected: list[int], pixels: dict[int, np.ndarray], jumped: bool) -> None:
    """Add the frame nearest to each of the selected stamps, which are removed from the list."""
    before: tuple[int, av.VideoFrame] | None = None
    for frame in frames:
        if frame.pts is None:
            continue
        if jumped and before is None and frame.pts > selected[0]:
            raise _Missed
        while selected and frame.pts >= selected[0]:
            stamp = selected.pop(0)
            nearest = frame if before is None or stamp - before[0] >= frame.pts - stamp else before[1]
            pixels.setdefault(int(nearest.pts or 0), _pixels(nearest))
        if not selected:
            return
        before = frame.pts, frame
    if selected and before is not None:  # the stream ended before the stamps did
        pixels.setdefault(before[0], _pixels(before[1]))


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as np.rot90
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

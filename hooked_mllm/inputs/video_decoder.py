"""Decoding selected frames of a video file with PyAV."""

import warnings
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


def decode(
    path: Path, choose: Callable[[int, float], np.ndarray], max_bytes: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """The frames that `choose` selects by their number and rate, their times in seconds from the first, and their rate.

    The first reading collects the packets' time stamps; the second skips groups of pictures without selected frames.
    """
    try:
        with av.open(str(path)) as container:
            stream = _largest(container, path)
            stamps, keys = _stamps(container, stream, path)
            base = stream.time_base or Fraction(1)
            times = (stamps - stamps[0]) * float(base)
            _check_whole(container, stream, times, float(stamps[0] * base), path)
            rate, frame_bytes = _rate(stream, times, path), stream.width * stream.height * 3
        index = np.unique(choose(len(stamps), rate))
        if len(index) * frame_bytes > max_bytes:
            raise InputError(
                f"{len(index)} frames of {str(path)!r} would take {len(index) * frame_bytes / 2**30:.1f} GiB, more "
                f"than {max_bytes / 2**30:.1f}: take fewer with fps=, num_frames= or max_frames=."
            )
        selected = stamps[index]
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
    return np.stack([pixels[stamp] for stamp in order]), times.clip(0), rate


def _largest(container: InputContainer, path: Path) -> av.VideoStream:
    """The stream with most pixels; the first of equals. Cover pictures (streams of one frame) do not count."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise InputError(f"{str(path)!r} has no video stream.")
    return max(streams, key=lambda s: s.width * s.height)


def _check_whole(
    container: InputContainer, stream: av.VideoStream, times: np.ndarray, start_s: float, path: Path
) -> None:
    """Raise an InputError if the header states a longer video stream than the file has.

    Other containers than these state the length of the whole file, sound included, or none.
    """
    declared, base = 0.0, stream.time_base or Fraction(1)
    if "mov" in container.format.name:
        declared = float((stream.duration or 0) * base)
    elif container.format.name == "avi":
        declared = float(stream.frames * base) - start_s
    elif clock := stream.metadata.get("DURATION"):  # Matroska, as hours:minutes:seconds from the clock's zero
        hours, minutes, seconds = (float(part) for part in clock.split(":"))
        declared = 3600 * hours + 60 * minutes + seconds - start_s
    step = float(np.diff(times).max()) if len(times) > 1 else 1 / float(stream.average_rate or 1)
    if declared > times[-1] + 2.5 * step:
        raise InputError(
            f"{str(path)!r} is cut off or its header is wrong: it states {declared:.2f} s of frames, and the file has "
            f"{len(times)} frames up to {times[-1] + step:.2f} s."
        )


def _rate(stream: av.VideoStream, times: np.ndarray, path: Path) -> float:
    """Frames a second: the header's, unless the time stamps contradict it."""
    stated = float(stream.average_rate) if stream.average_rate else 0.0
    if len(times) < 2:
        return stated or 1.0
    measured = (len(times) - 1) / float(times[-1])
    if stated and abs(stated / measured - 1) <= max(0.1, 1.5 / len(times)):
        return stated
    steps = np.diff(times)
    if stated and steps.max() <= 1.5 * steps.min():  # uneven frames have no one rate
        warnings.warn(
            f"The header of {str(path)!r} states {stated:g} frames a second, its time stamps {measured:g}: the time "
            "stamps are used.",
            stacklevel=2,
        )
    return measured


def _stamps(container: InputContainer, stream: av.VideoStream, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Time stamps of all frames, and of those at which decoding can start, in order of display."""
    stamps, keys = [], []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is None or packet.size == 0 or packet.is_discard:
            continue
        if packet.is_corrupt:
            raise InputError(f"{str(path)!r} is cut off or damaged: the frame at {stamp} is not whole in the file.")
        stamps.append(stamp)
        if packet.is_keyframe:
            keys.append(stamp)
    if not stamps:
        raise InputError(f"{str(path)!r} has a video stream without a single frame: the file does not decode.")
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

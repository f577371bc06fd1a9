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
    """The frames that `choose` selects by the times of all.

    The file is read twice: once for the packets' time stamps, which costs no decoding, then to decode the selected
    frames, with a jump over every group of pictures that holds none of them.

    Args:
        path: The file.
        choose: Takes the times of all frames in seconds from the first, and returns the numbers of those to decode.

    Returns:
        Frames uint8 `[frame height width 3]`, their times in seconds from the first, and the stream's average frame
        rate.

    Raises:
        InputError: No video stream, or frames that do not decode.
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
    sizes = {pixels[stamp].shape for stamp in order}
    if len(sizes) > 1:
        raise InputError(f"{str(path)!r} has frames of several sizes: {sorted(s[:2] for s in sizes)}.")
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
        runs = np.split(selected, np.flatnonzero(np.diff(group) > 1) + 1)
        starts = [
            int(keys[max(0, np.searchsorted(keys, run[0], side="right") - 1)]) if len(keys) else 0 for run in runs
        ]
        for number, (run, start) in enumerate(zip(runs, starts, strict=True)):
            jumped = number > 0 or start > (int(keys[0]) if len(keys) else 0)
            if jumped:
                container.seek(start, stream=stream)
            _collect(container.decode(stream), run.tolist(), pixels, jumped)
    return pixels


def _collect(frames: Iterator[av.VideoFrame], selected: list[int], pixels: dict[int, np.ndarray], jumped: bool) -> None:
    before: tuple[int, av.VideoFrame] | None = None
    queue = list(selected)
    for frame in frames:
        if frame.pts is None:
            continue
        if jumped and before is None and frame.pts > queue[0]:
            raise _Missed
        while queue and frame.pts >= queue[0]:
            stamp = queue.pop(0)
            nearest = frame if before is None or stamp - before[0] >= frame.pts - stamp else before[1]
            pixels.setdefault(int(nearest.pts or 0), _pixels(nearest))
        if not queue:
            return
        before = frame.pts, frame
    if queue and before is not None:  # the stream ended before the stamps did
        pixels.setdefault(before[0], _pixels(before[1]))


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise, as np.rot90
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels

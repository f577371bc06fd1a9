"""Video files of grey frames, written for a test."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from hooked_mllm.inputs.video import Video

NASA = Path(__file__).parents[1] / "data" / "nasa_13013.mp4"


def grey(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), level, dtype=np.uint8)


def write(path, frames, rate=10, stamps=None, size=None, gop=4, rotation=0, options=None):
    """Frames [height width 3] into a file, at 1/rate seconds each or at the times given in units of 1/1000 s."""
    with av.open(str(path), "w", options=options or {}) as container:
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

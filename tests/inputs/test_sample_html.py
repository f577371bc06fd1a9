"""Pictures and tensors of samples in HTML."""

import base64
import io
import re

import numpy as np
import torch
from PIL import Image

from helpers.tiny import tiny_image
from hooked_mllm import Video
from hooked_mllm.inputs.sample import media_html, tensors_html


def embedded(html):
    """The pictures of a page, decoded."""
    data = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in data]


def test_every_picture_and_the_first_frame_of_every_video_is_shown():
    frames = np.repeat(np.array([40, 90, 140, 200], dtype=np.uint8), 24 * 32 * 3).reshape(4, 24, 32, 3)
    film = Video.from_frames(frames, fps=2)
    html = media_html([tiny_image(40, 30), tiny_image(16, 20)], [film])
    for text in ("image 0, 40x30 px", "image 1, 16x20 px", "video 0, first of 4 frames"):
        assert text in html
    shown = embedded(html)
    assert len(shown) == 3
    ratios = [round(image.width / image.height, 1) for image in shown]
    assert ratios == [round(w / h, 1) for w, h in ((40, 30), (16, 20), (32, 24))]
    assert abs(np.asarray(shown[2]).mean() - 40) < 2


def test_tensors_by_shape_dtype_and_device_and_others_by_type():
    html = tensors_html(
        {"input_ids": torch.ones(2, 5, dtype=torch.long), "pixel<s>": torch.zeros(3), "cache": object()}
    )
    for text in ("input_ids", "[2, 5]", "int64 on cpu", "pixel&lt;s&gt;", "float32 on cpu", "object"):
        assert text in html
    assert "pixel<s>" not in html

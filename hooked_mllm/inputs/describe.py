"""Parts of samples in HTML: their pictures, and the tensors that a model is called with."""

from collections.abc import Mapping, Sequence

from PIL import Image
from torch import Tensor

from hooked_mllm.display.blocks import html_table
from hooked_mllm.display.images import html_thumbnails
from hooked_mllm.inputs.video import Video


def media_html(images: Sequence[Image.Image], videos: Sequence[Video]) -> str:
    """Thumbnails of the images, and of the first frame of each video."""
    named = [(f"image {i}, {x.width}x{x.height} px", x) for i, x in enumerate(images)]
    named += [(f"video {i}, first of {len(x)} frames", Image.fromarray(x.frames[0])) for i, x in enumerate(videos)]
    return html_thumbnails(named)


def tensors_html(inputs: Mapping[str, object]) -> str:
    """Name, shape, dtype and device of each tensor; other values by their type."""
    return html_table(
        [
            (name, list(x.shape), f"{str(x.dtype).removeprefix('torch.')} on {x.device}")
            if isinstance(x, Tensor)
            else (name, "", type(x).__name__)
            for name, x in inputs.items()
        ],
        ("input", "shape", "dtype"),
        named=True,
    )

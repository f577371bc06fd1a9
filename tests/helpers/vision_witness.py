"""Pictures of which the vision tower's positions are compared, and the pixels of each position."""

import torch
from hypothesis import strategies as st

QUESTION = "What colour is the mug?"
FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")
PLACEHOLDER = {
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
}
#: pixels of a patch of the tiny models, each way
PATCH = 4


def pixels_by_position(family, sample):
    """[row pos value]: the pixels that each position of a tiny tower is given; the class token none."""
    inputs = sample.inputs
    if family == "qwen3_vl":
        return inputs.get("pixel_values", inputs.get("pixel_values_videos"))[None]
    pixels = inputs.get("pixel_values", inputs.get("pixel_values_videos"))
    pixels = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels  # [tile channel height width]
    grid = pixels.shape[-1] // PATCH
    cut = pixels.reshape(len(pixels), 3, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return cut if family == "llava_onevision" else torch.cat([torch.zeros_like(cut[:, :1]), cut], 1)


@st.composite
def pictures(draw):
    width, height = draw(st.integers(12, 64)), draw(st.integers(12, 64))
    x0, y0 = draw(st.integers(0, width - 5)), draw(st.integers(0, height - 5))
    return width, height, (x0, y0, draw(st.integers(x0 + 4, width)), draw(st.integers(y0 + 4, height)))

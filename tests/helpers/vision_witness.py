"""Pictures of which the vision tower's positions are compared, the pixels of each position, and their order."""

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from hooked_mllm import Box
from hooked_mllm.errors import LayoutError

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


def negative(picture, x0, y0, x1, y1):
    """A copy of a picture or of frames with the colours of a rectangle inverted."""
    out = picture.copy()
    out[..., y0:y1, x0:x1, :] = 255 - out[..., y0:y1, x0:x1, :]
    return out


def near(box, width, height):
    """The rectangle that an edit of `box` may change after the resizing kernel."""
    margin = 3 * max(width, height) / 28 + 3
    return Box(box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)


def check_positions(model, changed, sample, region, reach, **which):
    """Positions that the region covers well have changed, and none that `reach` does not touch; returns the former."""
    try:
        well = model.vision_positions(sample, region, min_overlap=0.3, **which)
    except LayoutError as error:  # too small a box: no patch is covered well
        assert "of its footprint in" in str(error)
        well = torch.zeros_like(changed)
    assert well.shape == changed.shape
    assert changed[well].all(), "a position in the region has not changed"
    assert not (changed & ~model.vision_positions(sample, reach, **which)).any(), "a position elsewhere has changed"
    return well


def check_order_of_patches(model, width=40, height=24, side=8):
    """`vision_patches` is in the order of the tower: edits of the picture change the input of block 0 at its positions.

    For every family: it uses the processor and the tower of the model, and no fact of a family.
    """
    picture = np.random.default_rng(0).integers(0, 60, (height, width, 3), dtype=np.uint8)

    def prepared(pixels):
        sample = model.prepare(QUESTION, images=Image.fromarray(pixels))
        return sample, model.run_with_cache(sample, "vision.blocks.0.hook_resid_pre")[1]["vision", "resid_pre", 0]

    sample, stream = prepared(picture)  # stream [row pos d_model]
    covered = torch.zeros(stream.shape[:2], dtype=torch.bool)
    for x0 in range(0, width, side):
        for y0 in range(0, height, side):
            box = (x0, y0, x0 + side, y0 + side)
            changed = ((prepared(negative(picture, *box))[1] - stream).abs() > 1e-5).any(-1)
            covered |= check_positions(model, changed, sample, Box(*box), near(box, width, height))
    assert covered.sum() > covered.numel() / 2, "hardly any position was compared"

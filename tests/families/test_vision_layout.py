"""Positions of the vision tower against the pixels that go into it: by coordinate images, and by what edits change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.coordinates import (
    RAW,
    _measure,
    centre_error,
    coordinate_image,
    layout_of,
    media_of,
    per_patch,
    real,
    seen,
)
from helpers.tiny import ALL_FAMILIES, tiny_frames, tiny_image
from helpers.vision_witness import (
    FAMILIES,
    PLACEHOLDER,
    QUESTION,
    check_order_of_patches,
    check_positions,
    near,
    negative,
    pictures,
    pixels_by_position,
)
from helpers.wrapped import wrapped
from hooked_mllm import Box, Frames, Pages
from hooked_mllm.errors import LayoutError
from hooked_mllm.families import family_of
from hooked_mllm.families.vision_layout import VisionLayout
from hooked_mllm.layout.items import Patches

# -- footprints --------------------------------------------------------------------------------------------------------


def patches_of(family, inputs):
    """[row pos 7]: where each patch of the real processors was cut out of a coordinate image; class tokens are nan."""
    pixels = inputs["pixel_values"]
    if family == "qwen3_vl":
        return _measure(pixels.reshape(-1, 3, 2, 256)[:, :, 0], (2,))[None]
    if family == "llava_onevision":
        return per_patch(pixels[0], 14).flatten(1, 2)
    patches = per_patch(pixels, 14).flatten(1, 2)
    return torch.cat([torch.full((len(patches), 1, 7), torch.nan), patches], 1)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(width=st.integers(40, 700), height=st.integers(40, 700))
def test_footprints_at_real_sizes_are_where_patches_were_cut(family, width, height):
    config, processor = real(family)
    picture = coordinate_image(width, height)
    inputs = processor(text=PLACEHOLDER[family], images=[[picture]], **RAW)
    layout = VisionLayout.of(family_of(config), config, layout_of(config, processor, inputs, media_of(picture)))
    saw = seen(patches_of(family, inputs).flatten(0, 1))
    boxes, shown = layout.layout.boxes.numpy(), layout.layout.pixels.numpy()
    assert layout.shape == patches_of(family, inputs).shape[:2] and len(boxes) == len(saw.weight)
    # without a box: no picture, but for what the resizing kernel smears over its edge
    assert (np.isnan(saw.weight[~shown]) | (saw.weight[~shown] <= 0.02)).all()
    whole = shown & (saw.weight > 0.99)
    error = centre_error(boxes, saw)[whole]
    pixel = max(width / 384, height / 384, 1.0)  # of the original, in what the model is given
    assert error.max() <= 0.5 * pixel and whole.any()


def check(family, before, after, region, reach, **which):
    """What the region covers well has changed; what has changed is within reach of the region."""
    model = wrapped(family)
    shown = model.vision_positions(before)
    changed = (pixels_by_position(family, after) != pixels_by_position(family, before)).any(-1)
    changed = changed[: len(shown)] & shown  # an image's tiles are followed by padding, which kernels smear pixels over
    return check_positions(model, changed, before, region, reach, **which)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(pictures())
def test_what_an_edit_of_the_picture_changes_is_what_the_positions_see(family, drawn):
    width, height, box = drawn
    picture = np.random.default_rng(width).integers(0, 60, (height, width, 3), dtype=np.uint8)
    model = wrapped(family)
    before, after = (model.prepare(QUESTION, images=Image.fromarray(p)) for p in (picture, negative(picture, *box)))
    check(family, before, after, Box(*box), near(box, width, height), image=0)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(pictures(), st.integers(0, 2))
def test_among_several_pictures_the_edited_one_changes(family, drawn, which):
    width, height, box = drawn
    draw = np.random.default_rng(width)
    arrays = [draw.integers(0, 60, (height + 5 * i, width, 3), dtype=np.uint8) for i in range(3)]
    edited = [negative(a, *box) if i == which else a for i, a in enumerate(arrays)]
    model = wrapped(family)
    before, after = (model.prepare(QUESTION, images=[Image.fromarray(a) for a in x]) for x in (arrays, edited))
    well = check(family, before, after, Box(*box), near(box, width, height + 10), image=which)
    assert not (well & model.vision_positions(before, Pages({(which + 1) % 3}))).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_frames", [3, 4])
def test_frames_of_a_video(family, n_frames):
    frames = tiny_frames(n_frames) // 4
    edited = frames.copy()
    edited[2] = negative(frames[2], 8, 8, 24, 20)
    model = wrapped(family)
    before, after = (model.prepare(QUESTION, videos=(f, 2.0)) for f in (frames, edited))
    region, reach = (Frames(0.9, 1.1, box=b) for b in ((8, 8, 24, 20), (1, 1, 31, 24)))
    share = 0.3 if family != "qwen3_vl" else 0.15  # a position of its tower sees two frames
    changed = (pixels_by_position(family, after) != pixels_by_position(family, before)).any(-1)
    assert changed[model.vision_positions(before, region, min_overlap=share)].all()
    assert not (changed & ~model.vision_positions(before, reach)).any()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_patches_are_in_the_order_of_the_tower(family):
    check_order_of_patches(wrapped(family))


def test_patches_in_another_order_are_detected(monkeypatch):
    def row_by_row(item, config):
        boxes = item.boxes.reshape(3, 5, 4).repeat(2, axis=0).repeat(2, axis=1)  # [row column 4] -> [2 row 2 column 4]
        x = np.linspace(0, 40, 11)
        y = np.linspace(0, 24, 7)
        boxes[..., 0], boxes[..., 2] = x[:-1], x[1:]
        boxes[..., 1], boxes[..., 3] = y[:-1, None], y[1:, None]
        return Patches(boxes.reshape(1, -1, 4), item.frames[:1], item.views[:1])

    model = wrapped("qwen3_vl")
    monkeypatch.setattr(model.family, "vision_patches", row_by_row)
    with pytest.raises(AssertionError, match="a position in the region has not changed"):
        check_order_of_patches(model)


# -- views, tiles, batches ---------------------------------------------------------------------------------------------


def test_views_and_tiles_of_internvl():
    model = wrapped("internvl")
    sample = model.prepare(QUESTION, images=tiny_image(48, 20))  # two tiles or more, and a thumbnail
    every = model.vision_positions(sample)
    n = len(every) - 1
    assert n > 1 and not every[:, 0].any() and every[:, 1:].all()  # the class token sees nothing
    thumbnail = model.vision_positions(sample, view="thumbnail")
    assert thumbnail[-1, 1:].all() and not thumbnail[:-1].any()
    tiles = [model.vision_positions(sample, tile=t) for t in range(n)]
    for t, tile in enumerate(tiles):
        assert tile[t, 1:].all() and int(tile.sum()) == every.shape[1] - 1
    assert torch.equal(torch.stack([*tiles, thumbnail]).sum(0).bool(), every)
    with pytest.raises(LayoutError, match=rf"no tile {n} in image 0: they have tiles 0 to {n - 1}"):
        model.vision_positions(sample, tile=n)
    with pytest.raises(LayoutError, match="no view 'base'; it has thumbnail, tile"):
        model.vision_positions(sample, view="base")
    with pytest.raises(LayoutError, match="sees Box.* in view=None, tile=0"):
        model.vision_positions(sample, Box(40, 0, 48, 20), tile=0)


def test_views_and_tiles_of_llava_onevision():
    model = wrapped("llava_onevision")
    sample = model.prepare(QUESTION, images=tiny_image(48, 20))
    base, tile = (model.vision_positions(sample, view="base"), model.vision_positions(sample, view="highres", tile=1))
    assert base[0].all() and not base[1:].any() and 0 < int(tile.sum()) == int(tile[2].sum())
    with pytest.raises(LayoutError, match="they are not cut into tiles"):
        model.vision_positions(model.prepare(QUESTION, images=[tiny_image(), tiny_image()]), tile=0)

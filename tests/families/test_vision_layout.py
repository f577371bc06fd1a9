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
from helpers.tiny import tiny_frames, tiny_image
from helpers.wrapped import model_inputs, noise, plain, wrapped
from hooked_mllm import ActivationPatch, Box, Frames, HeadAblation, Mask, Pages, SampleBatch, Steer
from hooked_mllm.errors import InputError, LayoutError, UnsupportedModelError
from hooked_mllm.families import Family, family_of
from hooked_mllm.families.vision_layout import VisionLayout

QUESTION = "What colour is the mug?"
FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")
PLACEHOLDER = {
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
}
#: pixels of a patch of the tiny models, each way
PATCH = 4


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


def negative(picture, x0, y0, x1, y1):
    out = picture.copy()
    out[..., y0:y1, x0:x1, :] = 255 - out[..., y0:y1, x0:x1, :]
    return out


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


def check(family, before, after, region, near, **which):
    """What the region covers well has changed; what has changed is within reach of the region."""
    model = wrapped(family)
    sees = model.vision_positions(before)
    moved = (pixels_by_position(family, after) != pixels_by_position(family, before)).any(-1)
    moved = moved[: len(sees)] & sees  # behind an image's tiles comes padding, and kernels smear pixels over it
    try:
        well = model.vision_positions(before, region, min_overlap=0.3, **which)
    except LayoutError as error:  # too small a box: no patch is covered well
        assert "of its footprint in" in str(error)
        well = torch.zeros_like(sees)
    assert well.shape == moved.shape and moved[well].all()
    assert not (moved & ~model.vision_positions(before, near, **which)).any()
    return well


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(pictures())
def test_what_an_edit_of_the_picture_changes_is_what_the_positions_see(family, drawn):
    width, height, box = drawn
    picture = np.random.default_rng(width).integers(0, 60, (height, width, 3), dtype=np.uint8)
    model = wrapped(family)
    before, after = (model.prepare(QUESTION, images=Image.fromarray(p)) for p in (picture, negative(picture, *box)))
    margin = 3 * max(width, height) / 28 + 3  # the kernel's reach
    near = Box(box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)
    check(family, before, after, Box(*box), near, image=0)


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
    margin = 3 * max(width, height + 10) / 28 + 3
    near = Box(box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)
    well = check(family, before, after, Box(*box), near, image=which)
    assert not (well & model.vision_positions(before, Pages({(which + 1) % 3}))).any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_frames", [3, 4])
def test_frames_of_a_video(family, n_frames):
    frames = tiny_frames(n_frames) // 4
    edited = frames.copy()
    edited[2] = negative(frames[2], 8, 8, 24, 20)
    model = wrapped(family)
    before, after = (model.prepare(QUESTION, videos=(f, 2.0)) for f in (frames, edited))
    region, near = (Frames(0.9, 1.1, box=b) for b in ((8, 8, 24, 20), (1, 1, 31, 24)))
    share = 0.3 if family != "qwen3_vl" else 0.15  # a position of its tower sees two frames
    moved = (pixels_by_position(family, after) != pixels_by_position(family, before)).any(-1)
    assert moved[model.vision_positions(before, region, min_overlap=share)].all()
    assert not (moved & ~model.vision_positions(before, near)).any()


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


def test_a_batch_is_its_samples_one_after_the_other(family):
    model = wrapped(family)
    pictures = [[tiny_image(40, 24, seed=1)], [tiny_image(24, 40, seed=2)]]
    target = [Box(2, 2, 9, 9), Box(12, 20, 20, 30)]
    batch = model.prepare([QUESTION, "Where?"], images=pictures, target=target)
    joined = torch.cat([model.vision_positions(s, "target") for s in batch], 1 if family == "qwen3_vl" else 0)
    got = model.vision_positions(batch, "target")
    assert torch.equal(got, joined) and torch.equal(model.vision_positions(batch, target), joined)
    _, cache = model.run_with_cache(batch, "vision.blocks.0.hook_resid_pre")
    assert got.shape == cache["vision", "resid_pre", 0].shape[:2]
    steer = Steer(torch.ones(32), layer=0, positions=got, tower="vision")
    with torch.no_grad(), model.intervene(steer):
        both = model(batch, logits_to_keep=1)
    for i, sample in enumerate(batch):
        steer = Steer(torch.ones(32), layer=0, positions=model.vision_positions(sample, "target"), tower="vision")
        with torch.no_grad(), model.intervene(steer):
            torch.testing.assert_close(both[i], model(sample, logits_to_keep=1)[0], atol=1e-4, rtol=1e-4)


def test_a_sample_without_pictures_adds_no_rows(family):
    model = wrapped(family)
    alone = model.prepare(QUESTION, images=tiny_image())
    text = model.prepare("Where?")
    assert torch.equal(model.vision_positions(SampleBatch.collate([text, alone])), model.vision_positions(alone))
    with pytest.raises(LayoutError, match="its vision tower does not run"):
        model.vision_positions(text)
    with pytest.raises(LayoutError, match="No sample of this batch has an image"):
        model.vision_positions(SampleBatch.collate([text, text]))


# -- in use ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(family):
    return wrapped(family).prepare(QUESTION, images=tiny_image(40, 24), target=Box(6, 6, 17, 15))


def by_hand(family, inputs, path, edit, pre):
    """A plain transformers model with one bare torch hook."""
    module = plain(family).get_submodule(path)
    if pre:
        handle = module.register_forward_pre_hook(lambda m, args: (edit(args[0].clone()), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda m, args, out: edit(out.clone()))
    try:
        return plain(family)(**inputs).logits
    finally:
        handle.remove()


@torch.no_grad()
def test_ablation_of_a_vision_head_on_a_region(family, sample):
    model = wrapped(family)
    at = model.vision_positions(sample, "target")

    def zero(z):
        z.view(*at.shape, 2, 16)[..., 1, :][at] = 0
        return z

    part = model.family.vision
    expected = by_hand(family, sample.inputs, f"{part.blocks}.1.{part.block.o}", zero, pre=True)
    ablation = HeadAblation(["L1H1"], mode="zero", phase="prefill", tower="vision", positions=at)
    with model.intervene(ablation):
        got = model(sample)
    assert torch.equal(got, expected) and (got - model(sample)).abs().max() > 1e-4


@torch.no_grad()
def test_steering_and_patching_on_a_region(family, sample):
    model = wrapped(family)
    at, direction = model.vision_positions(sample, "target"), noise(torch.zeros(32))

    def steer(x):
        x.view(*at.shape, 32)[at] += direction
        return x

    expected = by_hand(family, sample.inputs, f"{model.family.vision.blocks}.0", steer, pre=False)
    with model.intervene(Steer(direction, layer=0, positions=at, tower="vision")):
        assert torch.equal(model(sample), expected)
    assert (expected - model(sample)).abs().max() > 1e-3

    other = model.prepare(QUESTION, images=tiny_image(40, 24, seed=3))
    _, cache = model.run_with_cache(other, "vision.blocks.0.hook_resid_post")

    def patch(x):
        x.view(*at.shape, 32)[at] = cache["vision", "resid_post", 0][at]
        return x

    expected = by_hand(family, sample.inputs, f"{model.family.vision.blocks}.0", patch, pre=False)
    with model.intervene(ActivationPatch("resid_post", cache, layers=0, positions=at, tower="vision")):
        assert torch.equal(model(sample), expected)


def test_values_of_the_tower_are_painted_over_the_picture(family):
    """Brightness by patch, painted back, is the picture made coarse."""
    model = wrapped(family)
    picture = np.zeros((24, 40, 3), np.uint8)
    picture[6:18, 20:40] = 255
    sample = model.prepare(QUESTION, images=Image.fromarray(picture))
    values = pixels_by_position(family, sample).mean(-1).flatten()
    painted = model.vision_layout(sample).to_image(values)
    bright, dark = painted[9:15, 25:36], painted[:, :14]
    assert painted.shape == (24, 40) and bright.min() > dark.max()


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do(family):
    model = wrapped(family)
    sample = model.prepare(QUESTION, images=tiny_image())
    batch = SampleBatch.collate([sample, sample])
    for call, error, message in (
        (lambda: model.vision_positions(model_inputs(family)), InputError, "a SampleBatch.*got dict.*model.prepare"),
        (lambda: model.vision_layout(batch), InputError, "Expected one Sample; got SampleBatch"),
        (lambda: model.vision_positions(sample, "target"), InputError, "no target: give `target=`"),
        (lambda: model.vision_positions(sample, "visual"), LayoutError, "only region name of the vision tower is 'target'; got 'visual'"),
        (lambda: model.vision_positions(batch, Box(0, 0, 4, 4)), InputError, "list of 2 regions.*got Box"),
        (lambda: model.vision_positions(batch, [Box(0, 0, 4, 4)]), InputError, "list of 2 regions.*got 1 regions"),
        (lambda: model.vision_positions(sample, Box(90, 90, 99, 99)), LayoutError, "lies outside image 0"),
        (lambda: model.vision_positions(sample, image=3), LayoutError, "no image 3: this input has 1"),
        (lambda: model.vision_positions(sample, Mask(np.eye(5, dtype=bool))), LayoutError, "must have its shape"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_images_beside_videos(family):
    model = wrapped(family)
    sample = model.prepare(QUESTION, images=tiny_image(), videos=(tiny_frames(4), 2.0))
    if family == "internvl":  # frames are tiles like any other
        _, cache = model.run_with_cache(sample, "vision.blocks.0.hook_resid_pre")
        rows = len(cache["vision", "resid_pre", 0])
        assert model.vision_positions(sample).shape == cache["vision", "resid_pre", 0].shape[:2]
        assert model.vision_positions(sample, video=0).any(1).tolist() == [False] * (rows - 4) + [True] * 4
        return
    with pytest.raises(LayoutError, match="Prepare images and videos apart"):
        model.vision_positions(sample)


def test_a_family_that_does_not_say_is_told_so(family, sample):
    with pytest.raises(UnsupportedModelError, match="does not say which pixels a patch"):
        Family.vision_patches(wrapped(family).family, sample.layout.items[0], None)

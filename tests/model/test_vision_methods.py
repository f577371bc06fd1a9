"""Positions of the vision tower by region: batches, edits there, painting, and what is none."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import tiny_frames, tiny_image
from helpers.vision_witness import QUESTION, pixels_by_position
from helpers.wrapped import model_inputs, noise, plain, wrapped
from hooked_mllm import ActivationPatch, Box, HeadAblation, Mask, SampleBatch, Steer
from hooked_mllm.errors import InputError, LayoutError, UnsupportedModelError
from hooked_mllm.families import Family


@pytest.fixture
def sample(family):
    return wrapped(family).prepare(QUESTION, images=tiny_image(40, 24), target=Box(6, 6, 17, 15))


def test_a_batch_is_its_samples_one_after_the_other(family):
    model = wrapped(family)
    pictures = [[tiny_image(40, 24, seed=1)], [tiny_image(24, 40, seed=2)]]
    target = [Box(2, 2, 9, 9), Box(12, 20, 20, 30)]
    batch = model.prepare([QUESTION, "Where?"], images=pictures, target=target)
    joined = torch.cat([model.vision_positions(s, "target") for s in batch], 1 if family == "qwen3_vl" else 0)
    got = model.vision_positions(batch, "target")
    assert torch.equal(model.vision_positions([*batch], "target"), joined)
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


def test_errors_state_what_to_do(family):
    model = wrapped(family)
    sample = model.prepare(QUESTION, images=tiny_image())
    batch = SampleBatch.collate([sample, sample])
    for call, error, message in (
        (lambda: model.vision_positions(model_inputs(family)), InputError, "model.prepare.*got dict"),
        (lambda: model.vision_positions(sample, "target"), InputError, "no target: give `target=`"),
        (
            lambda: model.vision_positions(sample, "visual"),
            LayoutError,
            "only region name of the vision tower is 'target'; got 'visual'",
        ),
        (lambda: model.vision_positions(batch, Box(0, 0, 4, 4)), InputError, "list of 2 regions.*got Box"),
        (lambda: model.vision_positions(batch, [Box(0, 0, 4, 4)]), InputError, "list of 2 regions.*got 1 regions"),
        (lambda: model.vision_positions(sample, Box(90, 90, 99, 99)), LayoutError, "lies outside image 0"),
        (lambda: model.vision_positions(sample, image=3), LayoutError, "no image 3: this input has 1"),
        (lambda: model.vision_positions(sample, Mask(np.eye(5, dtype=bool))), LayoutError, "must have its shape"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_images_alongside_videos(family):
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


def test_a_family_without_vision_patches_is_an_error(family, sample):
    with pytest.raises(UnsupportedModelError, match="does not state which pixels a patch"):
        Family.vision_patches(wrapped(family).family, sample.layout.items[0], None)

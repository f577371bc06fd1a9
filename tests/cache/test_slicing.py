"""One sample out of the cache of a batch: its vision and projector activations are those of a run of it alone."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import tiny_model, tiny_processor
from hooked_mllm import ActivationCache, HookedMLLM


@pytest.fixture(scope="module", params=["qwen3_vl", "llava_onevision", "internvl"])
def model(request):
    hf = tiny_model(request.param, dtype=torch.float64)
    return HookedMLLM.from_model(hf, tiny_processor(request.param), check=False)


def picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def batch(model):
    """Two images, none, one: of unequal sizes."""
    images = [[picture(60, 40, 0), picture(40, 40, 1)], None, [picture(40, 80, 2)]]
    return model.prepare(["What is it?", "Say it again, please", "Where?"], images=images)


VISION = ["vision.*", "projector.*"]


@pytest.mark.parametrize("index", [0, 2, -1])
def test_a_sample_of_a_batch_holds_what_a_run_of_it_alone_gives(model, batch, index):
    _, cache = model.run_with_cache(batch, names_filter=[*VISION, "hook_embed"])
    _, alone = model.run_with_cache(batch[index], names_filter=VISION)
    cut = cache.sample(index)
    assert set(alone) == {n for n in cut if n != "hook_embed"}
    for name, value in alone.items():
        torch.testing.assert_close(
            cut[name], value, atol=1e-4 if "pattern" in name or "scores" in name else 1e-9, rtol=1e-5
        )


def test_a_sample_without_an_image_has_no_vision_activations(model, batch):
    _, cache = model.run_with_cache(batch, names_filter=[*VISION, "hook_embed"])
    assert list(cache.sample(1)) == ["hook_embed"]


def test_a_slice_of_a_slice_and_a_file_keep_whose_images_are_whose(model, batch, tmp_path):
    _, cache = model.run_with_cache(batch, names_filter=[*VISION, "hook_embed"])
    cache.save(tmp_path / "cache.safetensors")
    read = ActivationCache.load(tmp_path / "cache.safetensors", model)
    name = "vision.blocks.1.hook_resid_post"
    for whole in (cache, read):
        assert torch.equal(whole.sample(slice(1, 3)).sample(1)[name], cache.sample(2)[name])


def test_images_and_videos_of_one_batch(model):
    frames = np.random.default_rng(3).integers(0, 255, (4, 40, 40, 3), dtype=np.uint8)
    batch = model.prepare(
        ["What is it?", "And this?"],
        images=[[picture(40, 40, 0)], [picture(40, 60, 1)]],
        videos=[[(frames, 2.0)], [(frames[:, ::-1].copy(), 2.0)]],
    )
    _, cache = model.run_with_cache(batch, names_filter=[*VISION, "hook_embed"])
    for index in (0, 1):
        _, alone = model.run_with_cache(
            batch[index], names_filter=["vision.blocks.2.hook_resid_post", "projector.hook_out"]
        )
        for name, value in alone.items():
            torch.testing.assert_close(cache.sample(index)[name], value, atol=1e-9, rtol=1e-6)

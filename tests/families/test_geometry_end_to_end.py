"""End to end: a block of the ORIGINAL picture is inverted, and the tokens that change are compared with the layout.

The vision blocks of a tiny model write nothing, so that patches do not mix; processor, tower, projector and the joining
with the text are the real ones. The embeddings of the language model must change at the tokens that the layout names,
and elsewhere only within reach of the kernel of the picture's resizing.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from helpers.tiny import tiny_frames, tiny_model, tiny_processor
from hooked_mllm.families import family_of
from hooked_mllm.layout import Box, Frames, ImageMedia, Mask, TokenLayout, VideoMedia

IMAGE = {
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava_onevision": "<image>",
    "internvl": "<IMG_CONTEXT>",
}
VIDEO = {"qwen3_vl": "<|vision_start|><|video_pad|><|vision_end|>", "llava_onevision": "<video>", "internvl": "<video>"}
TIMES = (0.0, 0.5, 1.0, 1.5, 2.0)


class Bench:
    """A model that keeps patches apart, its processor, and a prompt of some images and a video."""

    def __init__(self, family: str) -> None:
        self.name, self.model, self.processor = family, tiny_model(family), tiny_processor(family)
        self.family = family_of(self.model.config)
        block = self.family.vision.block
        for name, parameter in self.model.named_parameters():
            if name.startswith(self.family.vision.blocks) and any(f".{w}." in name for w in (block.o, block.mlp_out)):
                parameter.data.zero_()

    def inputs(self, images: list[np.ndarray], video: np.ndarray | None) -> dict:
        text = "look: " + " and ".join([IMAGE[self.name]] * len(images) + [VIDEO[self.name]] * (video is not None))
        kwargs: dict = {"images": [[Image.fromarray(i) for i in images]]} if images else {}
        if video is not None:
            n = len(video)
            kwargs |= {
                "videos": [torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()],
                "video_metadata": [VideoMetadata(total_num_frames=n, fps=2.0, frames_indices=list(range(n)))],
                "do_sample_frames": False,
            }
            kwargs |= {"cap_pixels_per_frame": False} if self.name == "qwen3_vl" else {}
        return dict(self.processor(text=[text], return_tensors="pt", **kwargs))

    def layout(self, images: list[np.ndarray], video: np.ndarray | None) -> TokenLayout:
        media = [ImageMedia(i.shape[1], i.shape[0]) for i in images]
        media += [] if video is None else [VideoMedia(video.shape[2], video.shape[1], len(video), TIMES[: len(video)])]
        inputs, config = self.inputs(images, video), self.model.config
        items = self.family.visual_items(config, self.processor, inputs, tuple(media))
        return TokenLayout.build(inputs["input_ids"][0], items, self.family.visual_token_ids(config), {})

    @torch.no_grad()
    def embeddings(self, images: list[np.ndarray], video: np.ndarray | None) -> torch.Tensor:
        """[pos d_model] at the input of the language model."""
        caught = []
        module = self.model.get_submodule(self.family.language_model)
        handle = module.register_forward_pre_hook(
            lambda m, a, kwargs: caught.append(kwargs["inputs_embeds"][0]), with_kwargs=True
        )
        self.model(**self.inputs(images, video), use_cache=False)
        handle.remove()
        return caught[0]

    def changed(self, before: tuple, after: tuple) -> np.ndarray:
        return (self.embeddings(*after) - self.embeddings(*before)).abs().amax(-1).numpy()


@pytest.fixture(scope="module", params=tuple(IMAGE))
def bench(request) -> Bench:
    return Bench(request.param)


def near(layout: TokenLayout, x0: float, y0: float, x1: float, y1: float) -> np.ndarray:
    """Tokens whose footprint comes so close to the block that the resizing kernel may reach it."""
    boxes = layout.boxes.numpy()
    size = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], -1)
    # bicubic: two pixels of the coarser of both pictures; four pixels or more make a token's side
    reach = 2 * np.maximum(1, size / 4) + 1
    return (
        (boxes[:, 0] - reach[:, 0] < x1)
        & (boxes[:, 2] + reach[:, 0] > x0)
        & (boxes[:, 1] - reach[:, 1] < y1)
        & (boxes[:, 3] + reach[:, 1] > y0)
    )


def negative(pixels: np.ndarray, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    out = pixels.copy()
    out[y0:y1, x0:x1] = 255 - out[y0:y1, x0:x1]
    return out


@pytest.mark.parametrize("sizes", [[(61, 44)], [(40, 90), (90, 30), (33, 33)]], ids=["one image", "three images"])
def test_a_block_of_an_image(bench, sizes):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
    layout = bench.layout(images, None)
    untouched = 0
    for trial in range(8):
        which = trial % len(images)
        width, height = sizes[which]
        x0, y0 = (int(v) for v in rng.integers(0, [width - 10, height - 10]))
        block = (x0, y0, min(width, x0 + 14), min(height, y0 + 12))
        other = [negative(i, *block) if n == which else i for n, i in enumerate(images)]
        change = bench.changed((images, None), (other, None))
        may = near(layout, *block) & layout.tokens(image=which).numpy()
        assert change[~may].max() <= 1e-5 * change.max()
        untouched += int((layout.pixels.numpy() & ~may).sum())
        # most of a footprint turned negative: the token cannot stay as it was
        boxes = layout.boxes.numpy()
        inner = np.clip(np.minimum(boxes[:, 2:], block[2:]) - np.maximum(boxes[:, :2], block[:2]), 0, None).prod(-1)
        covered = inner >= 0.5 * (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        covered &= layout.tokens(image=which).numpy()
        assert (change[covered] > 1e-2 * change.max()).all()
        # and the layout's targets are where nearly all of the change is
        target = layout.target(Box(*block, image=which)).numpy()
        assert change[target].sum() >= 0.9 * change.sum()
    assert untouched > 0
    newline = layout.visual.numpy() & ~layout.pixels.numpy()
    assert change[newline].max(initial=0.0) == 0.0


def test_a_block_of_one_frame(bench):
    video = tiny_frames(5, width=96, height=72, seed=3)
    images = [np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)]
    layout = bench.layout(images, video)
    for frame in range(5):
        block = (4, 6, 20, 18)
        other = video.copy()
        other[frame] = negative(video[frame], *block)
        change = bench.changed((images, video), (images, other))
        seen = ((layout.frame_range[:, 0] <= frame) & (frame <= layout.frame_range[:, 1])).numpy()
        may = near(layout, *block) & seen
        assert change[~may].max() <= 1e-5 * change.max()
        target = layout.target(Frames(TIMES[frame], TIMES[frame], box=block)).numpy()
        assert change[target].sum() >= 0.9 * change.sum()
        assert (seen & ~may & layout.pixels.numpy()).any()


def test_region_to_tokens_to_image(bench):
    rng = np.random.default_rng(5)
    for _ in range(20):
        width, height = (int(v) for v in rng.integers(12, 120, 2))
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        layout = bench.layout([picture], tiny_frames(3, width, height))
        x0, y0 = (int(v) for v in rng.integers(0, [width - 3, height - 3]))
        block = (x0, y0, x0 + 3, y0 + 3)
        inside = np.zeros((height, width), dtype=bool)
        inside[y0 : y0 + 3, x0 : x0 + 3] = True
        for target, where in [
            (layout.target(Box(*block)), {"image": 0}),
            (layout.target(Frames(TIMES[1], TIMES[1], box=block)), {"video": 0, "frame": 1}),
        ]:
            painted = layout.to_image(target.double(), **where)
            seen = ~np.isnan(layout.to_image(torch.zeros(len(layout)), **where))
            assert seen.all()  # at these sizes patches fill the tiles: nothing goes unseen
            assert painted[inside].all()
            # a token painted one overlaps the block: turned into a region again, its pixels lead back to it
            back = layout.to_image(layout.target(Mask(painted == 1)).double()) if "image" in where else painted
            assert (back >= painted).all()

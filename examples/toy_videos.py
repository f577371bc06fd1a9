"""The videos of each family's toy in training: `Medium` as in `toy_families.py`, where `pages` are moments.

Each class computes the same numbers as the processor and the official forward pass, faster; `check_format` in
`train_toy.py` and the tests compare them.
"""

from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from toy_families import CELLS, SIDE, InternVL, LlavaOnevision, Medium, Qwen3VL, normalised
from transformers import PreTrainedModel

from hooked_mllm.toys.build import MERGE, TILE
from hooked_mllm.toys.render import FRAMES, GRID, VIDEO_GRID, VIDEO_SCALE
from hooked_mllm.toys.video_task import MOMENT_S
from hooked_mllm.toys.vocabulary import VIDEO_TOKEN

VIDEO_CELLS = VIDEO_GRID**2
#: "< 0 . 2 seconds > <|vision_start|>" before the tokens of a moment, and "<|vision_end|>" after them
STAMP = 7


class Qwen3VLVideo(Qwen3VL):
    """A moment is one temporal patch of two frames: 36 tokens, 2 x 2 per cell, after its time as text."""

    pixels, views_per_page = "pixel_values_videos", FRAMES

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of a video of `pages` moments in the prompt."""
        tokens = "<|vision_start|>" + VIDEO_TOKEN * CELLS + "<|vision_end|>"
        middle = MOMENT_S * (FRAMES - 1) / FRAMES / 2
        moments = (f"<{moment * MOMENT_S + middle:.1f} seconds>{tokens}" for moment in range(pages))
        return "<|vision_start|>" + "".join(moments) + "<|vision_end|>"

    @staticmethod
    def model_pixels(views: UInt8[Tensor, "view 3 height width"], pages: int) -> Float[Tensor, "patch value"]:
        """The processor's `pixel_values_videos`."""
        # the patches of a merged cell follow one another, each through both frames of the moment
        patches = "(moment time) channel (y my py) (x mx px) -> (moment y x my mx) (channel time py px)"
        return rearrange(normalised(views), patches, time=FRAMES, y=GRID, my=MERGE, x=GRID, mx=MERGE)

    def logits(
        self, model: PreTrainedModel, views: Tensor, ids: Int[Tensor, "sample pos"], pages: int
    ) -> Float[Tensor, "sample pos word"]:
        """The logits of samples with `pages` moments each."""
        grid = torch.tensor([[len(views) // FRAMES, SIDE, SIDE]], device=ids.device)
        return model(
            input_ids=ids,
            pixel_values_videos=self.model_pixels(views, pages),
            video_grid_thw=grid,
            mm_token_type_ids=2 * (ids == model.config.video_token_id).int(),
            position_ids=self.positions(model, pages, ids.shape[1]).to(ids.device).expand(3, len(ids), -1),
            use_cache=False,
        ).logits

    @lru_cache(maxsize=512)  # noqa: B019  one object per run
    def positions(self, model: PreTrainedModel, pages: int, n: int) -> Int[Tensor, "3 1 pos"]:
        """The three rotary position ids, which are equal for every sequence of a batch."""
        ids = torch.full((1, n), model.config.text_config.pad_token_id)
        ids[0, self.cell_tokens(pages).flatten()] = model.config.video_token_id
        grid = torch.tensor([[pages, SIDE, SIDE]])
        kinds = 2 * (ids == model.config.video_token_id).int()
        return model.model.get_rope_index(ids, mm_token_type_ids=kinds, video_grid_thw=grid)[0].to(model.device)

    @staticmethod
    def cell_tokens(pages: int) -> Int[Tensor, "moment cell token"]:
        """Positions in the prompt of the tokens that see exactly one cell."""
        cell, part = torch.arange(VIDEO_CELLS)[:, None], torch.arange(VIDEO_SCALE**2)
        row = cell // VIDEO_GRID * VIDEO_SCALE + part // VIDEO_SCALE
        col = cell % VIDEO_GRID * VIDEO_SCALE + part % VIDEO_SCALE
        return 3 + STAMP + (STAMP + CELLS + 1) * torch.arange(pages)[:, None, None] + row * GRID + col

    @staticmethod
    def official(pages: int, samples: int) -> dict[str, Tensor]:
        """The arguments of the official forward pass in addition to tokens and pixels."""
        return {"video_grid_thw": torch.tensor([[pages, SIDE, SIDE]] * samples)}


class LlavaOnevisionVideo(LlavaOnevision):
    """A frame is 3 x 3 tokens, pooled from 6 x 6 patches; one newline token ends the video."""

    pixels, views_per_page = "pixel_values_videos", FRAMES

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of a video of `pages` moments in the prompt."""
        return "<video>" * (pages * FRAMES * VIDEO_CELLS + 1)

    @staticmethod
    def model_pixels(views: UInt8[Tensor, "view 3 height width"], pages: int) -> Float[Tensor, "sample frame 3 96 96"]:
        """The processor's `pixel_values_videos`."""
        return rearrange(normalised(views), "(sample frame) c h w -> sample frame c h w", frame=pages * FRAMES)

    def logits(
        self, model: PreTrainedModel, views: Tensor, ids: Int[Tensor, "sample pos"], pages: int
    ) -> Float[Tensor, "sample pos word"]:
        """The logits of samples with `pages` moments each."""
        return model(input_ids=ids, pixel_values_videos=self.model_pixels(views, pages), use_cache=False).logits

    @staticmethod
    def cell_tokens(pages: int) -> Int[Tensor, "moment cell token"]:
        """Positions in the prompt of the tokens that see exactly one cell."""
        frame = FRAMES * torch.arange(pages)[:, None, None] + torch.arange(FRAMES)
        return 2 + VIDEO_CELLS * frame + torch.arange(VIDEO_CELLS)[:, None]

    @staticmethod
    def official(pages: int, samples: int) -> dict[str, Tensor]:
        """The arguments of the official forward pass in addition to tokens and pixels."""
        return {}


class InternVLVideo(InternVL):
    """A frame is one tile of 48 x 48 px, 3 x 3 tokens, after its number as text."""

    views_per_page = FRAMES

    @staticmethod
    def placeholders(pages: int) -> str:
        """The text of a video of `pages` moments in the prompt."""
        tokens = "<img>" + "<IMG_CONTEXT>" * VIDEO_CELLS + "</img>"
        return "\n".join(f"Frame{frame + 1}: {tokens}" for frame in range(pages * FRAMES))

    @staticmethod
    def views(pixels: UInt8[Tensor, "frame 3 96 96"]) -> UInt8[Tensor, "frame 3 48 48"]:
        """The frames at the size of a tile."""
        return resize(pixels, [TILE, TILE], interpolation=InterpolationMode.BICUBIC, antialias=True)

    def seen_by(self, pages: int, cell: int) -> Int[Tensor, "moment token"]:
        """Positions in the prompt of all tokens that see the cell; a frame has no thumbnail."""
        return self.cell_tokens(pages)[:, cell]

    @staticmethod
    def cell_tokens(pages: int) -> Int[Tensor, "moment cell token"]:
        """Positions in the prompt of the tokens that see exactly one cell."""
        frame = FRAMES * torch.arange(pages)[:, None, None] + torch.arange(FRAMES)
        # "frame 1 : <img>" before the tokens of a frame, and "</img>" after them
        return 2 + 4 + (VIDEO_CELLS + 5) * frame + torch.arange(VIDEO_CELLS)[:, None]


VIDEOS: dict[str, type[Medium]] = {
    "qwen3_vl": Qwen3VLVideo,
    "llava_onevision": LlavaOnevisionVideo,
    "internvl": InternVLVideo,
}
